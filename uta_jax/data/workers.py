"""A crew of workers, threads or processes, that loads batches in order and says what ails it.

Own code, for no library keeps the promises: grain's worker processes deal the elements out by
worker, so that the saved position depends on their number, import JAX, and die of "exit code -9".
"""

import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import chain, islice

import numpy as np

from uta_jax import UserError
from uta_jax.data.processes import SLOTS, Chunk, Job, Processes, arrays, example, frames, run_chunk


class Crew:
    """Workers that run a job on the rows of batches, `SLOTS` batches ahead, in order.

    Args:
      job: see Job.
      shape: of the uint8 array that one batch fills, rows first.
      workers: processes; 0 for `threads` threads in this process.
      timeout_s: longest wait for a batch, in seconds.

    Raises:
      UserError: the processes cannot be started (open files, memory, a source without pickle).
    """

    def __init__(
        self, job: Job, shape: tuple[int, ...], *, workers: int, threads: int, timeout_s: float
    ):
        count = workers or threads
        self._processes = Processes(job, shape, workers) if workers else None
        memory = self._processes.memory if self._processes else None
        self._pixels, self._doing = arrays(shape, count, memory)
        self._timeout_s, self._chunk = timeout_s, max(1, min(32, shape[0] // (4 * count)))
        self._chunks: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: deque[list[Future]] = deque()
        self._slot, self._lock, self._closed = 0, threading.Lock(), False
        runs = [
            partial(self._processes.run, n, self._doing)
            if self._processes
            else partial(run_chunk, job, self._pixels, self._doing[n : n + 1])
            for n in range(count)
        ]
        self._threads = [
            threading.Thread(target=_serve, args=(self._chunks, run), daemon=True) for run in runs
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers; [] for threads."""
        return self._processes.pids if self._processes else []

    def run(self, plan: Iterable[list[tuple[int, int]]]) -> Iterator[tuple[np.ndarray, list]]:
        """(pixels [rows, ...], results) of every batch of `plan`, a list of (position, index) each.

        Raises:
          UserError: of the job; a worker that was killed; a batch later than `timeout_s`.
          RuntimeError: from any other exception in the job, naming the example.
        """
        plan, slot = iter(plan), 0
        for places in islice(plan, SLOTS):
            self._submit(places)
        while self._waiting:
            results = self._results(self._waiting[0])
            pixels = self._pixels[slot, : len(results)].copy()  # the slot is used again
            self._waiting.popleft()
            slot = (slot + 1) % SLOTS
            for places in islice(plan, 1):
                self._submit(places)
            yield pixels, results

    def _submit(self, places: list[tuple[int, int]]) -> None:
        starts = range(0, len(places), self._chunk)
        chunks = [Chunk(self._slot, n, places[n : n + self._chunk]) for n in starts]
        self._slot = (self._slot + 1) % SLOTS
        with self._lock:
            if self._closed:
                raise CancelledError
            self._waiting.append([Future() for _ in chunks])
            for task in zip(self._waiting[-1], chunks, strict=True):
                self._chunks.put(task)

    def _results(self, futures: list[Future]) -> list:
        results, deadline = [], time.monotonic() + self._timeout_s
        for future in futures:
            try:
                results += future.result(max(0, deadline - time.monotonic()))
            except TimeoutError:
                raise UserError(self._blocked()) from None
        return results

    def _blocked(self) -> str:
        """Who has been busy longest, at what, and where in the code."""
        busy = [n for n in range(len(self._doing)) if self._doing["busy"][n]]
        late = f"data: no batch for {self._timeout_s:g} s (data.timeout_s)"
        if not busy:
            return f"{late}, and no worker is at work: is the machine overloaded?"
        slow = min(busy, key=lambda n: self._doing["since"][n])
        if self._processes:
            who, stack = self._processes.name(slow), self._processes.stack(slow)
        else:
            who, stack = f"data thread {slow}", _thread_stack(self._threads[slow])
        seconds = time.monotonic() - self._doing["since"][slow]
        return (
            f"{late}: {who} has spent {seconds:.1f} s on {example(self._doing[slow])}, in {stack}"
        )

    def stop(self) -> None:
        """End the workers, whatever they are doing; who waits for a batch gets CancelledError."""
        with self._lock:
            self._closed = True
            for future in chain(*self._waiting):
                future.cancel()
        with suppress(queue.Empty):
            while True:
                self._chunks.get_nowait()
        for _ in self._threads:
            self._chunks.put(None)
        if self._processes:
            self._processes.stop()

    def close(self) -> None:
        """After `stop`: wait for the threads; one that is blocked is left behind."""
        for thread in self._threads:
            thread.join(timeout=1)
        if self._processes:
            self._processes.close()


def _serve(chunks: queue.SimpleQueue, run: Callable[[Chunk], list]) -> None:
    """A thread's life: run chunks until None."""
    while (task := chunks.get()) is not None:
        future, chunk = task
        with suppress(InvalidStateError):  # cancelled by close
            try:
                future.set_result(run(chunk))
            except BaseException as error:
                future.set_exception(error)


def _thread_stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident)
    found = reversed(traceback.extract_stack(frame)) if frame else ()
    return frames("\n".join(f'File "{f.filename}", line {f.lineno} in {f.name}' for f in found))
