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
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
        try:
            return dict(self._manager.restore(step, args=args).items())
        except (ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} does not fit this configuration: "
                f"use the one it was saved with, or another workdir"
                f" ({' '.join(str(error).split())})"
            ) from error

    def close(self) -> None:
        """Wait for the save under way; raise if it failed."""
        self._manager.wait_until_finished()
        self._manager.close()


def _target(shape, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


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
    config = configs.load_config(workdir / "config.json")
    path = config.teacher.path if OBJECTIVES[config.objective].needs_teacher else ""
    task = configs.make_task(config, read_spec(path) if path else None)
    teacher = load_clip(path, task.teacher.vision.image_size) if path else None
    checkpoints = Checkpoints(workdir)
    item = "ema" if config.optim.ema_decay else "params"
    params, meta = checkpoints.restore_params(task, meshes.make_mesh(), item)
    checkpoints.close()
    return SavedRun(config, task, teacher, meshes.fetch(params), meta)
