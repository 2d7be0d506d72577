"""The checkpoints of a run as directories: which are good, what becomes of the others.

    checkpoints/STEP/               acknowledged once it holds its manifest
    checkpoints/STEP.*-tmp*         being written; removed at the next start
    checkpoints/STEP.deleting       being deleted; removed at the next start
    checkpoints/quarantine/STEP-WHY moved aside: never read, never deleted

Nothing else is touched, whatever it is called.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from uta_jax import UserError, faults
from uta_jax.checkpoint import manifest

QUARANTINE = "quarantine"
_OURS_IN_PART = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleting)")


def steps(directory: Path) -> list[int]:
    """Every step that has a directory, acknowledged or not, in order."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name, re.ASCII))


def acknowledged(directory: Path) -> list[int]:
    """The steps whose manifest is there, in order; verified or not."""
    return [step for step in steps(directory) if manifest.exists(directory / str(step))]


def newest_good(directory: Path, repair: bool = False) -> tuple[int | None, str]:
    """The newest step that verifies, or None, and how fast that was.

    Those found bad on the way are named on stderr, and with ``repair`` moved to quarantine, so that
    they are in nobody's way. Without it, steps that are not acknowledged yet are passed by: another
    process may be writing them.
    """
    for step in reversed(steps(directory)):
        path = directory / str(step)
        if not (manifest.exists(path) or repair):
            continue
        why = "damaged" if manifest.exists(path) else "incomplete"
        bad, cost = manifest.verify(path)
        if not bad:
            return step, str(cost)
        fate = f"; moved to {quarantine(directory, step, why)}" if repair else ""
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        print(
            f"CHECKPOINT {step} IS {why.upper()}: {'; '.join(bad[:3])}{more}{fate}. An older one "
            "is used, if there is one",
            file=sys.stderr,
            flush=True,
        )
    return None, ""


def check_good(path: Path) -> None:
    """Raise UserError unless the checkpoint at ``path`` verifies."""
    if bad := manifest.verify(path)[0]:
        raise UserError(f"{path} is damaged: {'; '.join(bad[:3])}")


def quarantine(directory: Path, step: int, why: str) -> Path:
    """Move a step aside, under a name that says why; returns the new path."""
    aside = directory / QUARANTINE
    aside.mkdir(exist_ok=True)
    taken = {path.name for path in aside.iterdir()}
    name = next(name for name in _names(f"{step}-{why}") if name not in taken)
    return (directory / str(step)).rename(aside / name)


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in range(2, 10**6))


def damaged(directory: Path) -> list[str]:
    """Names in quarantine that were good once: where all of them are, a fresh start loses work."""
    aside = directory / QUARANTINE
    return sorted(path.name for path in aside.glob("*-damaged*")) if aside.is_dir() else []


def remove_temporaries(directory: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path in directory.iterdir():
        if path.is_dir() and _OURS_IN_PART.fullmatch(path.name):
            shutil.rmtree(path)


def check_space(directory: Path, size: int, keep: int) -> None:
    """Refuse a disk that has no room for ``keep`` + 1 checkpoints of ``size`` bytes, or is broken.

    Raises UserError.
    """
    there = sum(manifest.size_of(directory / str(step)) for step in acknowledged(directory))
    need, free = max(size, size * (keep + 1) - there), shutil.disk_usage(directory).free
    if need > free:
        raise UserError(
            f"{directory}: {free / 1e9:.3g} GB are free, config.train.keep={keep} needs "
            f"{need / 1e9:.3g} GB more ({keep} + 1 checkpoints of {size / 1e9:.3g} GB): make room, "
            "or lower it"
        )
    trial = directory / f"trial.{os.getpid()}"
    try:
        try:
            with trial.open("wb") as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: a trial file cannot be written: {error.strerror}") from error


def prune(directory: Path, keep: int, keep_every: int) -> None:
    """Delete acknowledged steps but the newest ``keep`` and the multiples of ``keep_every``.

    To be called when a new step has been acknowledged: then the newest was written and read back
    by this process, so that a good one always remains.
    """
    present = acknowledged(directory)
    for step in present[:-keep]:
        if not (keep_every and step % keep_every == 0):
            _delete(directory / str(step))


def _delete(path: Path) -> None:
    """First under another name: half a checkpoint must not look like one."""
    faults.reach("delete.begin")
    going = path.rename(path.with_name(path.name + ".deleting"))
    if faults.armed("delete.half"):
        shutil.rmtree(next(p for p in going.iterdir() if p.is_dir()))
        faults.reach("delete.half")
    shutil.rmtree(going)


def path_of(path: Path, step: int | None = None) -> Path:
    """The directory of a step, given it, the run or the run's ``checkpoints``.

    ``step``: which one; None takes the newest that verifies. Raises UserError where there is none.
    """
    if manifest.exists(path):
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is None:
        step, _ = newest_good(directory)
    if step is None or not (directory / str(step)).is_dir():
        raise UserError(f"no checkpoint{'' if step is None else f' {step}'} in {directory}")
    return directory / str(step)
