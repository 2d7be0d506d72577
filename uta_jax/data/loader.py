"""Batches for training and evaluation.

Batch k of a training run is a function of (data fingerprint, seed, k) alone. Every example of the
endless stream has a position; the id at a position comes from a shuffle keyed by (seed, epoch), the
crop from a generator keyed by (seed, position), and batch k holds positions k * batch_size onward.
Workers, processes and restarts only decide who computes what.
"""

import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import grain
import jax
import numpy as np

from uta_jax import UserError
from uta_jax.data.badexamples import BadExamples, hopeless, named
from uta_jax.data.examples import ATTEMPTS, Bad, EvalExamples, Loaded, TrainExamples
from uta_jax.data.sources import Source
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.data.workers import Crew

Batch = dict[str, np.ndarray | jax.Array]


@dataclass(frozen=True)
class Reading:
    """Who reads, and how patiently. The batches do not depend on it, but for allow_truncated."""

    workers: int = 0  # processes; 0: threads of this process
    threads: int = 2  # that decode where there are no worker processes
    timeout_s: float = 300.0  # a batch that takes longer ends the run
    allow_truncated: bool = False  # use JPEGs that end early

    def crew(self, job, shape: tuple[int, ...]) -> Crew:
        """Workers for batches of this shape, rows first."""
        return Crew(
            job, shape, workers=self.workers, threads=self.threads, timeout_s=self.timeout_s
        )


class TrainLoader:
    """An endless iterator over training batches.

    A batch holds image uint8 [b, s, s, 3], index int32 [b] (which example), and where the source
    has them label int32 [b] and, given a tokenizer, text int32 [b, l]. Epochs drop nothing:
    batches run across their edge. A bad example is counted, and another takes its row.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        image_size: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        tokenizer: Tokenizer | None = None,
        sharding: jax.sharding.Sharding | None = None,
        reading: Reading = Reading(),
        max_bad_fraction: float = 1e-3,
        bad_file: Path | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Start at the first example, or where `resume` says; no batch is read yet.

        Args:
          batch_size: global, over all processes.
          sharding: where given, batches are global arrays with this sharding of the batch axis,
            sent to the devices one batch ahead; otherwise this process's rows as numpy arrays.
          max_bad_fraction, bad_file: as in BadExamples; process 1 and later put their number
            into the name of the file.
          process_index, process_count: which rows of every batch this process makes; by default
            those of the running JAX process.

        Raises:
          UserError: fewer examples than one batch, a batch that the processes cannot share evenly,
            or text asked of a source without text.
        """
        index, processes = _process(process_index, process_count)
        _check(source, batch_size, processes, tokenizer)
        self._process = index, processes
        self._about = {
            "fingerprint": source.fingerprint(),
            "seed": seed,
            "batch_size": batch_size,
            "source": source.describe(),
        }
        self._start, self._batches = 0, 0
        self._plan = _Plan(len(source), seed, batch_size, index, processes)
        self._job = TrainExamples(
            source, seed, image_size, crop_scale, crop_ratio, flip, reading.allow_truncated,
            tokenizer,
        )  # fmt: skip
        self._reading, self._place = reading, _placer(sharding, processes)
        if bad_file and index:
            bad_file = bad_file.with_stem(f"{bad_file.stem}-{index}")
        self._bad = BadExamples(max_bad_fraction, bad_file)
        self._running: list = []
        # Also at exit: the workers must end before the interpreter takes their modules away.
        self._finalizer = weakref.finalize(self, _close, self._running)
        self.data_wait_s = 0.0  # how long the last next() waited

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise StopIteration
        start = time.perf_counter()
        if not self._running:
            self._run()
        try:
            batch, used, bad = next(self._running[1])
            self._bad.add(used, bad)
            if batch is None:
                raise hopeless(bad[-ATTEMPTS:])
        except BaseException:
            self.close()
            raise
        self._batches += 1
        self.data_wait_s = time.perf_counter() - start
        return batch

    def _run(self) -> None:
        if not self._start:
            self._bad.resume(0, 0, 0)  # the file may be of a run that was killed before it saved
        size = self._job.size
        crew = self._reading.crew(self._job, (self._plan.share, size, size, 3))
        self._running.append(crew)
        loaded = crew.run(self._plan.batches(self._start))
        self._running.append(_Ahead(_collated(loaded, self._place)))

    @property
    def bad_examples(self) -> int:
        """How many examples could not be used, of those met by the batches taken so far."""
        return self._bad.count

    @property
    def examples_seen(self) -> int:
        """Positions of the stream that the batches taken so far cover, over all processes."""
        return self._start + self._batches * self._about["batch_size"]

    def state(self) -> dict:
        """What a checkpoint keeps to continue after the batches taken so far, JSON-able."""
        seen = {"examples_seen": self.examples_seen, "bad_examples": self.bad_examples}
        return seen | self._about

    def resume(self, saved: dict, allow_change: bool = False) -> str:
        """Go on where `saved`, a `state`, was taken. To be called before the first batch.

        Returns what has changed in the data since, "" if nothing has.

        Raises:
          UserError: with a diff, where the data, the seed or the batch size changed and
            `allow_change` is not set.
        """
        changes = _changes(saved, self._about)
        seen = saved["examples_seen"]
        if changes and not allow_change:
            raise UserError(
                f"data: this run was saved with other data: {changes}. The order of examples would "
                "change: mend it, start a new workdir, or give --allow_data_change to go on after "
                f"the {seen} examples seen"
            )
        self._start = seen
        used = seen * self._plan.share // self._about["batch_size"]
        # The count saved is that of all processes: each goes on with its part of it.
        bad, (index, processes) = saved.get("bad_examples", 0), self._process
        self._bad.resume(bad // processes + (index < bad % processes), used, seen)
        return changes

    def close(self) -> None:
        """Stop the workers; the iterator is spent."""
        self._finalizer()


class _Plan:
    """This process's share of the endless stream, as lists of (position, example id).

    A process owns contiguous rows of every batch, so the batches of all processes, concatenated in
    process order, are the batch of a single process.
    """

    def __init__(self, examples: int, seed: int, batch_size: int, process: int, processes: int):
        self._ids = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
        self.share, self._batch_size = batch_size // processes, batch_size
        self._first = process * self.share

    def batches(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """From position `start` on, without end."""
        for first in count(start + self._first, self._batch_size):
            yield [(p, int(self._ids[p])) for p in range(first, first + self.share)]


def _changes(saved: dict, mine: dict) -> str:
    """The diff "field: before -> now; ..." between two states, "" if they are of the same data."""
    same = ("fingerprint", "seed", "batch_size")
    if all(saved.get(field) == mine[field] for field in same):
        return ""  # whatever else is described: the same data may have moved
    before, now = ({**s, **s.get("source", {})} for s in (saved, mine))
    fields = [*same, *mine["source"]]
    return "; ".join(f"{f}: {before.get(f)} -> {now[f]}" for f in fields if before.get(f) != now[f])


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize: str = "shortest",
    interpolation: str = "bicubic",
    resize_size: int = 0,
    tokenizer: Tokenizer | None = None,
    sharding: jax.sharding.Sharding | None = None,
    reading: Reading = Reading(),
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """Every example once, in order, over all processes; the last batch is filled up.

    Batches are those of TrainLoader plus valid bool [b]: False on the filling, and on examples that
    could not be used, of which a line on stderr tells at the end. batch_size is global; every
    process makes its contiguous rows of each batch, and as many batches as the others. resize,
    interpolation, resize_size: as in eval_transform.

    Raises:
      UserError: empty source, a batch that the processes cannot share evenly, or text asked of a
        source without text; at the end, if no example of this process could be used.
    """
    index, processes = _process(process_index, process_count)
    _check(source, 1, 1, tokenizer)
    _check_shares(batch_size, processes)
    share, last = batch_size // processes, len(source) - 1
    starts = range(index * share, -(-len(source) // batch_size) * batch_size, batch_size)
    # Rows after the last example stay out; of a share that is all filling, one example is read.
    rows = [range(first, max(first, min(first + share - 1, last)) + 1) for first in starts]
    plan = ([(i, min(i, last)) for i in row] for row in rows)
    job = EvalExamples(
        source, image_size, resize, interpolation, resize_size, reading.allow_truncated, tokenizer
    )
    place = _placer(sharding, processes)

    def batches() -> Iterator[Batch]:
        bad, running = [], []
        try:
            running.append(reading.crew(job, (share, image_size, image_size, 3)))
            collated = _collated(running[0].run(plan), lambda batch: place(_filled(batch, share)))
            running.append(_Ahead(collated))
            for batch, _, bad_here in running[1]:
                bad += bad_here
                yield batch
        finally:
            _close(running)
        _tell(bad, sum(i <= last for row in rows for i in row))

    return batches()


def _tell(bad: list[Bad], examples: int) -> None:
    """One line about the examples that an evaluation had to leave out."""
    if not bad:
        return
    line = (
        f"evaluation: {len(bad)} of {examples} examples cannot be used: "
        f"{named([one.key for one in bad], len(bad))}; the last one: {bad[-1].reason}"
    )
    if len(bad) == examples:
        raise UserError(line)
    print(line, file=sys.stderr, flush=True)


class _Ahead:
    """Runs an iterator in a thread of its own, one item ahead of who asks for them."""

    def __init__(self, items: Iterable):
        self._queue, self._closed = queue.Queue(maxsize=1), threading.Event()
        arguments = (iter(items), self._queue, self._closed)
        self._thread = threading.Thread(target=_feed, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        item, error = self._queue.get()
        if error is not None:
            raise error
        return item

    def stop(self) -> None:
        """Let the thread end at its next item; `close` waits for it."""
        self._closed.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()

    def close(self) -> None:
        self._thread.join(timeout=5)


def _feed(items: Iterator, into: queue.Queue, closed: threading.Event) -> None:
    while not closed.is_set():
        try:
            item = next(items), None
        except BaseException as error:  # StopIteration too: it ends the other side's loop
            item = None, error
        into.put(item)
        if item[1] is not None:
            return


def _close(running: list) -> None:
    """End crew and thread: first nothing new, then the workers, then the thread that waits."""
    for one in running:
        one.stop()
    for one in running:
        one.close()
    running.clear()


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )


def _check(source: Source, batch_size: int, processes: int, tokenizer: Tokenizer | None) -> None:
    if len(source) == 0:
        raise UserError("data: the source holds no examples")
    if len(source) < batch_size:
        raise UserError(
            f"batch_size={batch_size}: the data has {len(source)} examples, less than one batch"
        )
    _check_shares(batch_size, processes)
    if tokenizer is not None and "text" not in source.fields:
        raise UserError("data: the objective needs captions, but the examples have no 'text'")


def _check_shares(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        raise UserError(f"batch_size={batch_size}: must be divisible by the {processes} processes")


def _collated(loaded: Iterable[tuple[np.ndarray, list[Loaded]]], place) -> Iterator[tuple]:
    """(batch, how many of its rows are good, what was bad); the batch is None where one is lost."""
    for pixels, rows in loaded:
        bad = [one for row in rows for one in row.bad]
        if lost := [row for row in rows if row.values is None]:
            yield None, len(rows) - len(lost), bad
            return
        values = {name: np.stack([row.values[name] for row in rows]) for name in rows[0].values}
        yield place({"image": pixels} | values), len(rows), bad


def _filled(batch: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """`size` rows, by repeating the last one as not valid."""
    count = len(batch["index"])
    rows = np.minimum(np.arange(size), count - 1)
    filled = {name: array[rows] for name, array in batch.items()}
    return filled | {"valid": filled["valid"] & (np.arange(size) < count)}


def _placer(sharding: jax.sharding.Sharding | None, processes: int):
    """The function that makes global arrays of this process's rows; without sharding it is idle."""

    def place(array: np.ndarray) -> jax.Array:
        shape = (len(array) * processes, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return (lambda batch: jax.tree.map(place, batch)) if sharding is not None else lambda b: b
