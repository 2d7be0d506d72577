"""One update again, to look at: its batch, its loss, and where its gradient is large."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from uta_jax import UserError, processes
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.checkpoint import Checkpoints, folder
from uta_jax.interop.teacher import read_spec
from uta_jax.ledger import Ledger
from uta_jax.lifetime import Signals
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import TrainState, compile_step, init_state
from uta_jax.train import make_loader, prepare


def replay(config: ConfigDict, workdir: str | Path, step: int) -> dict[str, float]:
    """Compute update ``step`` (1-based) once more and print it; nothing is written.

    Batch, crops and mask are exactly its own. The parameters are those of the newest checkpoint
    before it (or of the start): its own only if that is the one of step - 1. Returns the figures.
    """
    workdir = Path(workdir)
    processes.refuse_several("train --replay")
    processes.settle()
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.path = ""
    spec = read_spec(config.teacher.path) if OBJECTIVES[config.objective].needs_teacher else None
    source = configs.open_data(config.data)
    recipe = configs.make_recipe(config, spec, len(source))
    if not 1 <= step <= recipe.optim.total_steps:
        raise UserError(f"--replay={step}: the run has the steps 1 to {recipe.optim.total_steps}")
    mesh = meshes.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), Checkpoints(workdir) as checkpoints:
        run = prepare(config, recipe, mesh, workdir, Signals(), Ledger())
        state = _state_before(run, checkpoints, step)
        loader = make_loader(run, source, bad_file=None)
        try:
            seen = {"examples_seen": (step - 1) * config.data.batch_size, "bad_examples": 0}
            loader.resume(loader.state() | seen)
            batch = next(loader)
        finally:
            loader.close()
        _, values = compile_step(recipe, mesh, run.frozen)(state, run.frozen, batch)
    figures = {name: float(value) for name, value in jax.device_get(values).items()}
    print(f"examples of the data: {' '.join(map(str, np.asarray(batch['index'])))}")
    for name, value in sorted(figures.items()):
        print(f"{name:40} {value:.6g}")
    return figures


def _state_before(run, checkpoints: Checkpoints, step: int) -> TrainState:
    """The newest good state from before update ``step``, told that it is the one just before."""
    present = folder.acknowledged(checkpoints.directory)
    found = max((s for s in present if s < step), default=None)
    if found is None:
        state, whose = init_state(run.recipe, run.mesh), "the start"
    else:
        folder.check_good(checkpoints.directory / str(found))
        state, _ = checkpoints.restore(run.recipe, run.mesh, found)
        whose = f"checkpoint {found}"
    own = " (its own)" if (found or 0) == step - 1 else ""
    print(f"REPLAY of update {step} with the parameters of {whose}{own}")
    number = jax.device_put(np.int32(step - 1), meshes.replicated(run.mesh))
    return replace(state, step=number)
