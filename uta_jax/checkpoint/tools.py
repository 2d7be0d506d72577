"""``uta-jax checkpoint list | verify | copy``: checkpoints looked at, and moved, by hand."""

import shutil
from pathlib import Path

from uta_jax import UserError
from uta_jax.checkpoint import folder, manifest


def directory_of(workdir: str | Path) -> Path:
    """The checkpoints of a run; UserError where there are none."""
    directory = Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{workdir}: no checkpoints here; name the workdir of a training run")
    return directory


def listing(workdir: str | Path) -> list[str]:
    """One line for each checkpoint, and for what lies in quarantine; reads no contents."""
    directory = directory_of(workdir)
    lines = []
    for step in folder.steps(directory):
        path = directory / str(step)
        state = "acknowledged" if manifest.exists(path) else "incomplete: no manifest"
        lines.append(f"{step:>9}  {manifest.size_of(path) / 1e6:10.1f} MB  {state}")
    aside = directory / folder.QUARANTINE
    names = sorted(p.name for p in aside.iterdir()) if aside.is_dir() else []
    return lines + [f"{name:>9}  in {folder.QUARANTINE}" for name in names]


def verify(workdir: str | Path) -> tuple[list[str], bool]:
    """A line for each checkpoint, with every file that is not as written; whether all are good."""
    directory, lines, good = directory_of(workdir), [], True
    for step in folder.steps(directory):
        bad, cost = manifest.verify(directory / str(step))
        lines.append(f"{step:>9}  {'DAMAGED' if bad else f'good ({cost})'}")
        lines += [f"           {problem}" for problem in bad]
        good = good and not bad
    return lines or [f"{directory}: no checkpoints"], good and bool(lines)


def copy(workdir: str | Path, destination: str | Path, step: int | None = None) -> Path:
    """Copy a checkpoint, and the run's configuration, to a new workdir; verified on both sides.

    ``step``: which; by default the newest that verifies. It appears whole or not at all. Raises
    UserError where it is damaged, or the destination has it already.
    """
    workdir, source = Path(workdir), folder.path_of(directory_of(workdir), step)
    target = Path(destination) / "checkpoints" / source.name
    if target.exists():
        raise UserError(f"{target} is there already: name another folder")
    folder.check_good(source)
    # A name that the next run in the destination takes away, should this be interrupted.
    new = target.with_name(f"{source.name}.orbax-checkpoint-tmp-copy")
    try:
        shutil.copytree(source, new)
        folder.check_good(new)
        manifest.sync(new)
        if (workdir / "config.json").is_file():
            shutil.copy2(workdir / "config.json", Path(destination) / "config.json")
        new.rename(target)
    except (OSError, shutil.Error) as error:
        raise UserError(f"{target}: nothing copied ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target
