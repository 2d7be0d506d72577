"""The pictures of training crops as one panel, drawn while a run trains."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from uta_jax import mesh as meshes
from uta_jax.objectives import Task
from uta_jax.pictures import colour, crops


def make_panel(config, task: Task, mesh: Mesh, frozen: dict) -> Callable[[dict], np.ndarray] | None:
    """The function student's vision tower -> panel [h, w, 3]; None where none is asked for.

    Its rows are those of ``crops.draw``, its columns the crops; they stay the same through the run.
    Of several processes all must call it. ``frozen``: the teacher on the devices, {} without one.

    Raises:
      UserError: the training images cannot be read.
    """
    if not config.train.panels:
        return None
    image_bhwc = crops.training_crops(config, task, config.train.panels)
    placed = meshes.replicate(mesh, image_bhwc)

    def panel(vision: dict) -> np.ndarray:
        size, seed = config.data.batch_size, config.seed
        found = crops.look(vision, frozen, placed, task=task, batch_size=size, seed=seed)
        drawn = crops.draw(image_bhwc, meshes.fetch(found), task)
        return colour.mosaic([row.pictures for row in drawn.rows])

    return panel
