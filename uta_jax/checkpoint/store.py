"""Saving and restoring states: orbax behind a small interface.

A checkpoint holds the items ``params``, ``opt``, ``ema`` (sharded arrays), ``data`` (the position
in the data) and ``meta`` (step, format, the teacher's provenance and what else the run keeps), and
a manifest. The teacher's weights are in none of them.
"""

import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.path import atomicity

from uta_jax import UserError, __version__, faults
from uta_jax import mesh as meshes
from uta_jax.checkpoint import folder, manifest
from uta_jax.objectives import Task
from uta_jax.processes import gather, is_first
from uta_jax.step import Recipe, TrainState, param_shapes, state_shapes, state_shardings

FORMAT = 1  # of what is written here; raised when an older release could not read it
ARRAYS = ("params", "opt", "ema")


class SaveError(UserError):
    """A checkpoint could not be written; those that stand are whole."""

    exit_code = 4


class Checkpoints:
    """The checkpoints of one workdir; saving goes on in the background until ``close``.

    ``awaited``: ``save`` returns only when the checkpoint counts.
    """

    def __init__(self, workdir: Path, keep: int = 2, keep_every: int = 0, *, awaited: bool = False):
        for name in ("absl", "asyncio"):  # orbax's ways to tell at length what SaveError says
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._keep, self._keep_every, self._awaited = keep, keep_every, awaited
        self._orbax = _orbax(self._acknowledge)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future | None = None
        self._under_way: int | None = None  # step

    def open(self, state: TrainState) -> None:
        """Take possession, as the one run of the workdir: remove what a killed one left over.

        Raises UserError where there is no room for checkpoints of ``state`` (shapes will do).
        """
        if not is_first():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            folder.remove_temporaries(self.directory)
        except OSError as error:
            raise UserError(f"{self.directory}: {error.strerror}; name another workdir") from error
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        folder.check_space(self.directory, size, self._keep)

    def latest(self) -> int | None:
        """The newest acknowledged step, or None."""
        return max(folder.acknowledged(self.directory), default=None)

    def save(self, state: TrainState, data: dict, meta: dict) -> None:
        """Begin to save ``state`` under its step; returns once its arrays are on their way.

        Waits for the save before this one. Raises SaveError if either failed.
        """
        step = int(state.step)
        self.wait()
        faults.reach("save.begin")
        if not self.directory.is_dir():
            raise SaveError(f"{self.directory} was removed while the run was on: nothing is saved")
        self._under_way = step
        about = {"step": step, "format": FORMAT, "version": __version__, **meta}
        items = {"params": state.params, "opt": state.opt_state, "ema": state.ema}
        arrays = to_host({name: tree for name, tree in items.items() if tree})
        self._saving = self._background.submit(self._write, step, arrays, data, about)
        if self._awaited:
            self.wait()

    def _write(self, step: int, arrays: dict, data: dict, meta: dict) -> None:
        """In the background: orbax's own asynchronous save computes in the loop for longer."""
        args = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        self._orbax.save(self.directory / str(step), ocp.args.Composite(**args))

    def poll(self) -> None:
        """Raise SaveError if the save under way has failed; to be called with every step."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; raises SaveError, once, if it failed."""
        saving, self._saving = self._saving, None
        if saving:
            with self._blaming_the_disk():
                saving.result()

    def _acknowledge(self, path: Path) -> None:
        """Of a directory that has just got its name; in the background, on the first process."""
        faults.reach("save.committed")
        manifest.write(path)
        faults.reach("save.acknowledged")
        folder.prune(self.directory, self._keep, self._keep_every)

    @contextmanager
    def _blaming_the_disk(self) -> Iterator[None]:
        """Turns whatever a save raises into a SaveError; orbax has no error of its own for it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SaveError:
        """What to tell of a failed save, after removing what it left."""
        newest = self.latest()
        if is_first() and self._under_way is not None:
            name = f"{self._under_way}.orbax-checkpoint-tmp"
            for path in self.directory.glob(f"{name}*"):
                _remove(path)
        reason = " ".join(str(error).split())
        advice = next((fix for pattern, fix in _ADVICE if re.search(pattern, reason)), "")
        stands = "none stands" if newest is None else f"that of step {newest} stands"
        return SaveError(
            f"checkpoint {self._under_way} of {self.directory.parent} was not saved"
            f"{advice and f': {advice}'} ({stands}; {type(error).__name__}: {reason[:300]})"
        )

    def find(self) -> int | None:
        """The newest step that verifies, or None; bad ones are moved to quarantine, and named.

        The first process reads and decides for all.
        """
        return self._newest_good(repair=True)

    def _newest_good(self, repair: bool) -> int | None:
        step = None
        if is_first():
            step, cost = folder.newest_good(self.directory, repair=repair)
            if cost and repair:
                print(f"VERIFIED checkpoint {step}: {cost}", flush=True)
        return gather("newest checkpoint", step)[0]

    def restore(
        self, recipe: Recipe, mesh: Mesh, step: int | None = None
    ) -> tuple[TrainState, dict]:
        """A state, laid out on ``mesh`` whatever mesh it was saved from, and what goes with it.

        ``step``: as ``find`` gave it; None is the newest. The second value is the item ``meta``,
        with the item ``data`` in it. Raises UserError where the checkpoint is of another model,
        of a later release, or not there.
        """
        target = jax.tree.map(_target, state_shapes(recipe), state_shardings(recipe, mesh))
        items = {"params": target.params, "opt": target.opt_state}
        if recipe.ema_decay:
            items["ema"] = target.ema
        saved, meta = self._read(items, step)
        done = jax.device_put(jnp.int32(meta["step"]), meshes.replicated(mesh))
        return TrainState(done, saved["params"], saved["opt"], saved.get("ema", {})), meta

    def restore_params(self, task: Task, mesh: Mesh, item: str) -> tuple[dict, dict]:
        """The item ``params`` or ``ema`` of the newest good checkpoint, and its meta."""
        shapes = param_shapes(task)
        target = jax.tree.map(_target, shapes, meshes.shardings(mesh, shapes))
        saved, meta = self._read({item: target}, self._newest_good(repair=False))
        return saved[item], meta

    def _read(self, targets: dict, step: int | None) -> tuple[dict, dict]:
        self.wait()  # orbax is with the thread that saves
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.directory}: train first")
        path = self.directory / str(step)
        meta = read_meta(path)
        _check_fits(path, targets)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        return dict(self._orbax.restore(path, ocp.args.Composite(**args)).items()), meta

    def close(self) -> None:
        """Wait for the save under way; raise SaveError if it failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except SaveError as error:
            if kind is None:
                raise
            print(error, file=sys.stderr, flush=True)  # what ended the run comes last


# Pattern in what the system said -> what helps.
_ADVICE = (
    (r"RESOURCE_EXHAUSTED|No space left|Errno 28|OS error 28", "the disk is full; make room, or "
     "lower config.train.keep"),
    (r"quota|Errno 122|OS error 122", "the quota is used up; make room, or lower "
     "config.train.keep"),
    (r"File too large|Errno 27|OS error 27", "a limit on the size of files is in the way; see "
     "`ulimit -f`"),
    (r"Read-only|Errno 30|OS error 30", "the disk is read-only; mount it for writing"),
    (r"PERMISSION_DENIED|Permission denied", "the directory may not be written to; mend its "
     "permissions"),
    (r"Input/output|Errno 5\b|OS error 5\b", "the disk fails; look at the system's log before you "
     "trust it again"),
    (r"NOT_FOUND|No such file|Errno 2\b|OS error 2\b", "its directory was removed or renamed while "
     "the run was on"),
)  # fmt: skip


def _orbax(acknowledge) -> ocp.Checkpointer:
    """The one that writes and reads; to be used by one thread at a time.

    Where the processes are named, they wait for each other by JAX's service. Else they would do so
    by a sum over all devices, which must not come from a thread beside the loop's.
    """
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    among = ocp.options.MultiprocessingOptions(active_processes=everyone)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=among)
    )
    return ocp.Checkpointer(
        handler,
        multiprocessing_options=among,
        temporary_path_class=_temporary_path(acknowledge),
    )


def to_host(tree):
    """Copies in the host's memory, which the devices make while the loop goes on.

    The next update writes into the very memory of the state that it is given.
    """
    kinds = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), tree)
    return jax.device_put(tree, kinds)


def _remove(path: Path) -> None:
    """Orbax gives up at the first error, and what else it had begun goes on creating files."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)
        if not path.exists():
            return


def _temporary_path(acknowledge) -> type:
    """Orbax's way to a name that appears at once, with what is ours before and after."""

    class Temporary(atomicity.AtomicRenameTemporaryPath):
        async def create(self):
            path = await super().create()
            faults.reach_once_there("save.shard", Path(path), "*/ocdbt.process_*/d/*")
            return path

        async def finalize(self):
            faults.reach("save.commit")
            await super().finalize()
            acknowledge(Path(self.get_final()))

    return Temporary


def _target(shape, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def read_meta(path: Path) -> dict:
    """The item ``meta`` of a checkpoint with the item ``data`` in it.

    Raises UserError for a checkpoint of a later release.
    """
    args = ocp.args.Composite(meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        saved = reader.restore(path, args)
    meta = saved["meta"]
    if meta["format"] > FORMAT:
        raise UserError(
            f"{path} was written by uta-jax {meta['version']} (format {meta['format']}); this is "
            f"uta-jax {__version__}, which reads formats up to {FORMAT}: install the newer one"
        )
    return meta | {"data": saved["data"]}


def load_params(path: Path, item: str = "params") -> dict:
    """The item ``params`` or ``ema`` of the checkpoint at ``path`` as NumPy arrays, whole.

    Needs no configuration and no device but the CPU.
    """
    if not (tree := _metadata(path, item)):
        raise UserError(f"{path} holds no {item!r}: name one of {', '.join(ARRAYS)} that it holds")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=as_numpy)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path / item, args)


def _metadata(path: Path, item: str):
    """The tree of what an item holds, {} where there is none."""
    if not (path / item).is_dir():
        return {}
    return ocp.StandardCheckpointHandler().metadata(epath.Path(path / item)).tree


def _check_fits(path: Path, targets: dict) -> None:
    """Refuse a checkpoint of another model by the arrays it lists, before they are read.

    Orbax finds out halfway, says so at great length from several threads, and casts to another
    type without a word.
    """
    wrong = []
    for item, target in targets.items():
        stored, ours = _arrays(_metadata(path, item)), _arrays(target)
        names = sorted(n for n in stored.keys() | ours.keys() if stored.get(n) != ours.get(n))
        wrong += [f"{item}/{n}: {stored.get(n)} saved, {ours.get(n)} wanted" for n in names]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"checkpoint {path} does not fit this configuration, {len(wrong)} arrays differ: "
            f"{'; '.join(wrong[:5])}{more}: use the configuration it was saved with, or another "
            "workdir"
        )


def _arrays(tree) -> dict[str, str]:
    """Path -> shape and type."""
    return {
        meshes.path_name(path): f"{np.dtype(x.dtype).name}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(tree)
    }
