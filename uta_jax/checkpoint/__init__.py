"""Checkpoints: ``store`` saves and restores, ``folder`` keeps house, ``manifest`` verifies.

Here: what a run's folder holds, for all that comes after training.
"""

from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.checkpoint import folder, store
from uta_jax.checkpoint.store import Checkpoints
from uta_jax.config_files import load_config
from uta_jax.interop.teacher import Checkpoint, load_clip, read_spec
from uta_jax.models.presets import ClipSpec
from uta_jax.objectives import DECODER, OBJECTIVES, Task
from uta_jax.tasks import make_task


@dataclass(frozen=True)
class SavedRun:
    """A finished or interrupted run, read from its folder; parameters are NumPy arrays."""

    config: ConfigDict
    task: Task
    teacher: Checkpoint | None
    student: dict  # the newest parameters; their average where one is kept
    meta: dict

    @property
    def spec(self) -> ClipSpec:
        """What the student is, with the text tower it was aligned to or trained with."""
        return self.task.clip

    @property
    def clip(self) -> dict:
        """The student as a whole CLIP, vision, text, logit_scale; or the vision alone."""
        towers = {name: tree for name, tree in self.student.items() if name != DECODER}
        return self.teacher.params | towers if self.teacher and self.spec.text else towers


def load_run(workdir: str | Path) -> SavedRun:
    """Read configuration, teacher and newest checkpoint of ``workdir``; not its training data."""
    workdir = Path(workdir)
    config = load_config(workdir / "config.json")
    path = config.teacher.path if OBJECTIVES[config.objective].needs_teacher else ""
    with configs.blame(f"config.teacher.path of {workdir}"):
        spec = read_spec(path) if path else None
    task = make_task(config, spec)
    with configs.blame(f"config.teacher.path of {workdir}"):
        teacher = load_clip(path, task.teacher.vision.image_size) if path else None
    item = "ema" if config.optim.ema_decay else "params"
    with Checkpoints(workdir) as checkpoints:
        params, meta = checkpoints.restore_params(task, meshes.make_mesh(), item)
    return SavedRun(config, task, teacher, meshes.fetch(params), meta)


def load_params(path: str | Path, item: str = "params", step: int | None = None) -> dict:
    """The parameters alone, as nested dicts of NumPy arrays; needs no configuration.

    Args:
      path: a workdir, its ``checkpoints``, or the directory of one step.
      item: ``params``, or ``ema`` for their average.
      step: which; by default the newest that verifies.

    Raises UserError where there is none, or the item is not in it.
    """
    return store.load_params(folder.path_of(Path(path), step), item)
