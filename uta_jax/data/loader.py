"""Batches for training and evaluation.

Batch k of a training run is a function of (data fingerprint, seed, k) alone. Every example of the
endless stream has a position; the id at a position comes from a shuffle keyed by (seed, epoch), the
crop from a generator keyed by (seed, position), and batch k holds positions k * batch_size onward.
Threads, processes and restarts only decide who computes what.
"""

import contextlib
import sys
import time
import weakref
from collections.abc import Iterator

import grain
import jax
import numpy as np

from uta_jax import UserError
from uta_jax.data.sources import Source
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.data.transforms import eval_transform, train_transform

Batch = dict[str, np.ndarray | jax.Array]


class _Positions:
    """This process's positions of the endless stream, in order, as (position, example id).

    A process owns contiguous rows of every batch, so the batches of all processes, concatenated in
    process order, are the batch of a single process.
    """

    def __init__(self, ids: grain.MapDataset, batch_size: int, start_step: int, rows: range):
        self._ids, self._rows = ids, rows
        self._batch_size, self._start_step = batch_size, start_step

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, n: int) -> tuple[int, int]:
        step, row = divmod(n, len(self._rows))
        position = (self._start_step + step) * self._batch_size + self._rows[row]
        return position, self._ids[position]


class TrainLoader:
    """An endless iterator over training batches.

    A batch holds image uint8 [b, s, s, 3], index int32 [b] (which example), and where the source
    has them label int32 [b] and, given a tokenizer, text int32 [b, l]. Epochs drop nothing: batches
    run across their edge.
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
        start_step: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        threads: int = 2,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Start at batch `start_step`; nothing before it is read.

        Args:
          batch_size: global, over all processes.
          sharding: where given, batches are global arrays with this sharding of the batch axis,
            sent to the devices one batch ahead; otherwise this process's rows as numpy arrays.
          threads: how many decode; batches do not depend on it.
          process_index, process_count: which rows of every batch this process makes; by default
            those of the running JAX process.

        Raises:
          UserError: fewer examples than one batch, a batch that the processes cannot share evenly,
            or text asked of a source without text.
        """
        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
        _check(source, batch_size, process_count, tokenizer)
        self._fingerprint, self._seed, self._batch_size = source.fingerprint(), seed, batch_size
        share = batch_size // process_count
        rows = range(process_index * share, (process_index + 1) * share)
        ids = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        positions = grain.MapDataset.source(_Positions(ids, batch_size, start_step, rows))

        def load(at: tuple[int, int]) -> dict:
            position, index = at
            example = source[index]
            rng = np.random.default_rng([seed, position])
            crop = _named(train_transform, example, rng, image_size, crop_scale, crop_ratio, flip)
            return _row(example, crop, index)

        batches = _batched(positions.map(load), share, tokenizer, threads)
        if sharding is not None:
            batches = batches.map(lambda batch: _to_device(batch, sharding, process_count))
        ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
        self._open = [iter(ahead)]
        # Also at exit: grain's threads must end before the interpreter takes their modules away.
        self._finalizer = weakref.finalize(self, _close, self._open)
        self.data_wait_s = 0.0  # how long the last next() waited

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        start = time.perf_counter()
        batch = next(self._open[0])
        self.data_wait_s = time.perf_counter() - start
        return batch

    def state(self, step: int) -> dict:
        """What a checkpoint keeps to continue at batch `step`, JSON-able."""
        return {
            "examples_seen": step * self._batch_size,
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "batch_size": self._batch_size,
        }

    def check_state(self, saved: dict) -> None:
        """Refuse a checkpoint made with other data, another seed or another batch size.

        Raises:
          UserError: naming the field that differs.
        """
        for field in ("fingerprint", "seed", "batch_size"):
            mine = self.state(0)[field]
            if saved[field] != mine:
                raise UserError(
                    f"data {field}: the checkpoint was made with {saved[field]}, this run has "
                    f"{mine}; the order of batches would change, so start a new workdir"
                )

    def close(self) -> None:
        """Stop the threads; the iterator is spent."""
        self._finalizer()


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    tokenizer: Tokenizer | None = None,
    sharding: jax.sharding.Sharding | None = None,
    threads: int = 2,
) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up by repeating its last row.

    Batches are those of TrainLoader plus valid bool [b], False on the filling.

    Raises:
      UserError: empty source, or text asked of a source without text.
    """
    _check(source, 1, 1, tokenizer)

    def load(index: int) -> dict:
        example = source[index]
        return _row(example, _named(eval_transform, example, image_size), index)

    indices = grain.MapDataset.range(len(source))
    batches = _batched(indices.map(load), batch_size, tokenizer, threads)
    batches = batches.map(lambda batch: _filled(batch, batch_size))
    if sharding is not None:
        batches = batches.map(lambda batch: _to_device(batch, sharding, 1))
    return _closing(batches)


def _batched(examples: grain.MapDataset, size: int, tokenizer: Tokenizer | None, threads: int):
    """Batches of `size` examples, in order, loaded by `threads` threads up to two batches ahead."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * size, threads))
    rows = examples.to_iter_dataset(options)
    return rows.batch(size, batch_fn=lambda group: _collate(group, tokenizer))


def _closing(batches: grain.IterDataset) -> Iterator[Batch]:
    with contextlib.closing(iter(batches)) as iterator:
        yield from iterator


def _close(iterators: list) -> None:
    iterators.pop().close()


def _check(source: Source, batch_size: int, processes: int, tokenizer: Tokenizer | None) -> None:
    if len(source) == 0:
        raise UserError("data: the source holds no examples")
    if len(source) < batch_size:
        raise UserError(
            f"batch_size={batch_size}: the data has {len(source)} examples, less than one batch"
        )
    if batch_size % processes:
        raise UserError(f"batch_size={batch_size}: must be divisible by the {processes} processes")
    if tokenizer is not None and "text" not in source[0]:
        raise UserError("data: the objective needs captions, but the examples have no 'text'")


def _named(transform, example: dict, *args) -> np.ndarray:
    """transform(image, *args), its errors naming the example."""
    try:
        return transform(example["image"], *args)
    except UserError as error:
        raise UserError(f"data example {example['key']!r}: {error}") from None


def _row(example: dict, pixels: np.ndarray, index: int) -> dict:
    row = {"image": pixels, "index": np.int32(index)}
    if "label" in example:
        row["label"] = np.int32(example["label"])
    if "text" in example:
        row["text"] = example["text"]
    return row


def _collate(rows: list[dict], tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "text"}
    if tokenizer is not None:
        batch["text"] = tokenizer([row["text"] for row in rows])
    return batch


def _filled(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    count = len(batch["index"])
    rows = np.minimum(np.arange(batch_size), count - 1)
    filled = {name: array[rows] for name, array in batch.items()}
    return filled | {"valid": np.arange(batch_size) < count}


def _to_device(batch: dict[str, np.ndarray], sharding, process_count: int) -> dict[str, jax.Array]:
    def place(array: np.ndarray) -> jax.Array:
        shape = (len(array) * process_count, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: place(array) for name, array in batch.items()}
