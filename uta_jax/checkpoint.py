"""Saved states: orbax behind a small interface, and what a run's folder holds.

One checkpoint holds the items ``params``, ``opt``, ``ema`` (sharded arrays) and ``meta`` (JSON:
step, data position, the teacher's provenance). The teacher's weights are in none of them.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uta_jax import UserError
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.config_files import load_config
from uta_jax.interop.teacher import Checkpoint, load_clip, read_spec
from uta_jax.models.presets import ClipSpec
from uta_jax.objectives import OBJECTIVES, Task
from uta_jax.step import Recipe, TrainState, param_shapes, state_shapes, state_shardings


class Checkpoints:
    """The checkpoints of one workdir; saving goes on in the background until ``close``."""

    def __init__(self, workdir: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(directory, options=options)

    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict) -> None:
        """Save ``state`` under its step; returns once its arrays are copied off the devices.

        Raises if the previous save failed, or if orbax declines this one.
        """
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave({"step": step, **meta}),
        }
        if state.ema:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.check_for_errors()
        if not self._manager.save(step, args=ocp.args.Composite(**items)):
            raise RuntimeError(f"step {step} was not saved: a newer checkpoint is in the workdir")

    def restore(self, recipe: Recipe, mesh: Mesh) -> tuple[TrainState, dict]:
        """The newest state, laid out on ``mesh`` whatever mesh it was saved from, and its meta."""
        target = jax.tree.map(_target, state_shapes(recipe), state_shardings(recipe, mesh))
        items = {"params": target.params, "opt": target.opt_state}
        if recipe.ema_decay:
            items["ema"] = target.ema
        saved = self._read(items)
        step = jax.device_put(jnp.int32(saved["meta"]["step"]), meshes.replicated(mesh))
        state = TrainState(step, saved["params"], saved["opt"], saved.get("ema", {}))
        return state, saved["meta"]

    def restore_params(self, task: Task, mesh: Mesh, item: str) -> tuple[dict, dict]:
        """The item ``params`` or ``ema`` of the newest checkpoint, and its meta."""
        shapes = param_shapes(task)
        saved = self._read({item: jax.tree.map(_target, shapes, meshes.shardings(mesh, shapes))})
        return saved[item], saved["meta"]

    def _read(self, targets: dict) -> dict:
        step = self.latest()
        if step is None:
            raise UserError(f"no checkpoint in {self._manager.directory}: train first")
        where = f"checkpoint {step} in {self._manager.directory}"
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
        try:
            _check_fits(self._manager.directory / str(step), targets, where)
            return dict(self._manager.restore(step, args=args).items())
        except UserError:
            raise
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{where} is damaged, or of another optimizer: use the configuration it was saved "
                f"with, or another workdir ({' '.join(str(error).split())[:200]})"
            ) from error

    def close(self) -> None:
        """Wait for the save under way; raise if it failed."""
        self._manager.wait_until_finished()
        self._manager.close()


def _target(shape, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _check_fits(directory: Path, targets: dict, where: str) -> None:
    """Refuse a checkpoint of another model by the names and shapes it lists, before it is read.

    Orbax finds out halfway, and says so at great length from several threads.
    """
    for item in sorted(targets.keys() & {"params", "ema"}):
        stored = {}
        if (directory / item).is_dir():
            stored = _shapes(ocp.StandardCheckpointHandler().metadata(directory / item).tree)
        ours = _shapes(targets[item])
        wrong = sorted(n for n in stored.keys() | ours.keys() if stored.get(n) != ours.get(n))
        if wrong:
            raise UserError(
                f"{where} does not fit this configuration: {len(wrong)} arrays of {item!r} differ "
                f"({wrong[0]}: {stored.get(wrong[0])} saved, {ours.get(wrong[0])} wanted, ...): "
                "use the configuration it was saved with, or another workdir"
            )


def _shapes(tree) -> dict[str, tuple]:
    return {meshes.path_name(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(tree)}


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
        """The student as a whole CLIP: vision, text, logit_scale."""
        return self.student if self.teacher is None else self.teacher.params | self.student


def load_run(workdir: str | Path) -> SavedRun:
    """Read configuration, teacher and newest checkpoint of ``workdir``; not its training data."""
    workdir = Path(workdir)
    config = load_config(workdir / "config.json")
    path = config.teacher.path if OBJECTIVES[config.objective].needs_teacher else ""
    with configs.blame(f"config.teacher.path of {workdir}"):
        spec = read_spec(path) if path else None
    task = configs.make_task(config, spec)
    with configs.blame(f"config.teacher.path of {workdir}"):
        teacher = load_clip(path, task.teacher.vision.image_size) if path else None
    checkpoints = Checkpoints(workdir)
    item = "ema" if config.optim.ema_decay else "params"
    params, meta = checkpoints.restore_params(task, meshes.make_mesh(), item)
    checkpoints.close()
    return SavedRun(config, task, teacher, meshes.fetch(params), meta)
