"""Where numbers go: ``metrics.jsonl`` (the truth), boards, and the progress bar."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from uta_jax import UserError


class Writer:
    """Appends one JSON object a call to ``metrics.jsonl`` and mirrors it to the boards.

    Boards are TensorBoard and, where a project is named, Weights & Biases. One that fails is told
    of and done without: a run does not end because a service is down. What a resumed run is about
    to compute again is cut from the file first, so that each step stands in it once. TensorBoard is
    told the same by its own ``purge_step``.
    """

    def __init__(self, workdir: Path, start_step: int, wandb: str = ""):
        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(path) if row["step"] <= start_step]
        # The file is the only copy: it is replaced whole, so that no kill can leave half of it.
        new = path.with_name(path.name + ".tmp")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(new, path)
        self._file = path.open("a", buffering=1)
        self._boards = {"TensorBoard": _tensorboard(str(workdir), purge_step=start_step + 1)}
        if wandb:
            with self._surviving("Weights & Biases"):
                self._boards["Weights & Biases"] = _Wandb(workdir, wandb)

    def write(self, step: int, values: dict[str, float | list[float] | str]) -> None:
        """Record ``values`` as of update ``step`` (1-based); all but numbers in the file alone."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._tell("add_scalar", name, value, step)

    def picture(self, step: int, name: str, pixels_hwc: np.ndarray) -> None:
        """Show a picture, uint8 [h, w, 3], on the boards."""
        self._tell("add_image", name, pixels_hwc, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        self._tell("close")

    def _tell(self, method: str, *args, **kwargs) -> None:
        """Call a method of every board."""
        for name, board in list(self._boards.items()):
            with self._surviving(name):
                getattr(board, method)(*args, **kwargs)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Do without that board from now on if what is done inside fails."""
        try:
            yield
        except Exception as error:  # whatever a service's client raises
            self._boards.pop(name, None)
            about = f"{type(error).__name__}: {error}".split("\n")[0]
            tqdm.write(
                f"{name} failed and is left out from here on ({about}); metrics.jsonl has all",
                file=sys.stderr,
            )


class _Wandb:
    """Weights & Biases behind the few methods of a ``SummaryWriter``; a workdir is one run."""

    def __init__(self, workdir: Path, project: str):
        import wandb

        path = Path(workdir).resolve()
        name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        self._make_image = wandb.Image
        self._run = wandb.init(
            project=project, dir=str(path), name=path.name, id=name, resume="allow"
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._run.log({name: value}, step=step)

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        self._run.log({name: self._make_image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _tensorboard(*args, **kwargs):
    """A SummaryWriter of tensorboardX, kept from PyTorch.

    It would import that wherever it is installed, for an annotation, at seconds a start.
    """
    hidden = {"torch": None} if "torch" not in sys.modules else {}
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter(*args, **kwargs)


def read(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl``, [] if there is none, without a half-written last one.

    Raises UserError naming the line where any other is not an object with a ``step``.
    """
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_row(line) for line in lines]
    if None in rows:
        number = rows.index(None) + 1
        raise UserError(f"{path}: line {number} is damaged; mend or delete it, the rest is kept")
    return rows if (end := _row(last)) is None else [*rows, end]


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Meter:
    """Means of the metrics, rate and wait for data over the steps since the last ``read``."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._sums, self._good, self._waits, self._since = {}, 0, [], time.perf_counter()

    def add(self, values: dict[str, float], data_wait_s: float) -> None:
        """Count one step; {} where its metrics are of no use."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._good += bool(values)
        self._waits.append(1000 * data_wait_s)

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` spent on something else (evaluation, saving) out of the rate."""
        self._since += seconds

    def read(self) -> dict[str, float | list[float]]:
        """Means since the last call, ``seconds`` they took, ``images_per_s``, ``data_wait_ms``.

        ``data_wait_ms_by_step`` lists the wait of every step since the last call. The first window
        of a process holds the compilation.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values = {name: total / self._good for name, total in self._sums.items()}
        values["seconds"] = seconds
        values["images_per_s"] = len(self._waits) * self._batch_size / seconds
        values["data_wait_ms"] = sum(self._waits) / len(self._waits)
        values["data_wait_ms_by_step"] = [round(wait, 3) for wait in self._waits]
        self._reset()
        return values


def progress_bar(
    total: int, done: int, unit: str = "step", desc: str = "train", shown: bool = True
) -> tqdm:
    """Bar over ``unit``s with rate and ETA; a line every 20 seconds where there is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 20
    return tqdm(
        total=total, initial=done, unit=unit, mininterval=interval, desc=desc, disable=not shown
    )
