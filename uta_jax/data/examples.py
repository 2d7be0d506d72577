"""What a worker does with one place in the stream of examples: read, decode, crop, tokenize.

Imports no JAX of its own and knows neither batches nor processes; everything random comes from
(seed, position).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from uta_jax.data import BadExample
from uta_jax.data.sources import Source
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.data.transforms import eval_transform, train_transform

ATTEMPTS = 16  # examples that are tried for one position


def random_at(*numbers: int) -> Random:
    """The generator of these numbers.

    Python's own: it starts in a fifth of the time of NumPy's, and its ``random()``, the one method
    to be used, promises the same sequence in every version.
    """
    return Random(" ".join(map(str, numbers)))


class Bad(NamedTuple):
    """An example that could not be used."""

    position: int  # in the endless stream; in an evaluation the index
    index: int  # of the source
    key: str
    reason: str  # one printable line


class Loaded(NamedTuple):
    """What is left of a position beside its pixels: values of the batch, and what was bad there."""

    values: dict[str, np.generic | np.ndarray] | None  # None: nothing usable was found
    bad: tuple[Bad, ...]


@dataclass(frozen=True)
class TrainExamples:
    """Puts a random crop of the example at a position into its row.

    Where that example is bad, another takes its place, drawn from (seed, position, attempt) alone,
    so that all other positions stay what they are. values["index"] is the example that was used.
    """

    source: Source
    seed: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    allow_truncated: bool = False
    tokenizer: Tokenizer | None = None

    def __call__(
        self, position: int, index: int, pixels: np.ndarray, note: Callable[[str], None]
    ) -> Loaded:
        bad = []
        for attempt in range(1, ATTEMPTS + 1):
            found = _Example(self.source, index, note)
            try:
                example = found.example()
                pixels[:] = train_transform(
                    example["image"],
                    random_at(self.seed, position),
                    self.size,
                    self.scale,
                    self.ratio,
                    self.flip,
                    allow_truncated=self.allow_truncated,
                )
                return Loaded(found.values(self.tokenizer), tuple(bad))
            except BadExample as error:
                bad.append(Bad(position, index, found.key, str(error)))
            index = int(random_at(self.seed, position, attempt).random() * len(self.source))
        return Loaded(None, tuple(bad))


@dataclass(frozen=True)
class EvalExamples:
    """Puts an example, as evaluation sees it, into its row; zeros where it is bad.

    Where position and index differ the row is filling. values["valid"] is False there, and where
    the example is bad.
    """

    source: Source
    size: int
    resize: str = "shortest"
    interpolation: str = "bicubic"
    resize_size: int = 0
    allow_truncated: bool = False
    tokenizer: Tokenizer | None = None

    def __call__(
        self, position: int, index: int, pixels: np.ndarray, note: Callable[[str], None]
    ) -> Loaded:
        found = _Example(self.source, index, note)
        try:
            pixels[:] = eval_transform(
                found.example()["image"],
                self.size,
                self.resize,
                self.interpolation,
                self.resize_size,
                allow_truncated=self.allow_truncated,
            )
            values = found.values(self.tokenizer, len(self.source.class_names))
            return Loaded(values | {"valid": np.bool_(position == index)}, ())
        except BadExample as error:
            pixels[:] = 0
            bad = Bad(position, index, found.key, str(error))
            return Loaded(self._empty(index), (bad,) if position == index else ())

    def _empty(self, index: int) -> dict[str, np.generic | np.ndarray]:
        values = {"index": np.int32(index), "valid": np.False_}
        if "label" in self.source.fields:
            values["label"] = np.int32(0)
        if self.tokenizer is not None:
            values["text"] = self.tokenizer([""])[0]
        return values


def checked_label(label: int, classes: int = 0) -> np.int32:
    """A label as a batch holds it.

    Training takes any number, -1 of an unlabelled split too; evaluation only those of `classes`.

    Raises:
      BadExample: no number of a class, or none of 32 bits.
    """
    low, high = (0, classes) if classes else (-(2**31), 2**31)
    if not low <= label < high:
        raise BadExample(f"label {label} is not in {low} .. {high - 1}")
    return np.int32(label)


class _Example:
    """One example while it is read; `key` is the best name known so far."""

    def __init__(self, source: Source, index: int, note: Callable[[str], None]):
        self._source, self._index, self._note = source, index, note
        self.key = f"example {index}"

    def example(self) -> dict:
        self._example = self._source[self._index]
        self.key = self._example["key"]
        self._note(self.key)
        return self._example

    def values(
        self, tokenizer: Tokenizer | None, classes: int = 0
    ) -> dict[str, np.generic | np.ndarray]:
        """index int32, label int32 of a labelled source, text int32 [l] with a tokenizer.

        classes: as in checked_label.
        """
        values = {"index": np.int32(self._index)}
        if "label" in self._source.fields:
            values["label"] = checked_label(self._example["label"], classes)
        if tokenizer is not None:
            if "text" not in self._example:
                raise BadExample("has no text")
            values["text"] = tokenizer([self._example["text"]])[0]
        return values
