"""Where examples come from: random access by index, images still encoded.

A source is what Source below says. An example holds ``image`` (encoded bytes) and ``key`` (str),
and where known ``text`` (str), ``label`` (int) and ``mask`` (PNG bytes: 0 background, class c
stored as c + 1).

Sources can be pickled, and used by several threads and by forked or spawned processes.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from uta_jax import UserError
from uta_jax.data.files import IMAGE_SUFFIXES
from uta_jax.data.folder import ImageFolder
from uta_jax.data.mixture import Mixture
from uta_jax.data.parquet import ParquetSource
from uta_jax.data.records import ArrayRecordSource, TfdsSource
from uta_jax.data.synthetic import SyntheticSource
from uta_jax.data.tarbuild import build_index
from uta_jax.data.tars import TarSource

__all__ = [
    "IMAGE_SUFFIXES",
    "SOURCES",
    "ArrayRecordSource",
    "ImageFolder",
    "Mixture",
    "ParquetSource",
    "Source",
    "SyntheticSource",
    "TarSource",
    "TfdsSource",
    "build_index",
    "open_mixture",
    "open_source",
]


class Source(Protocol):
    """Examples by index; the fingerprint changes when the examples behind them change.

    ``__getitem__`` raises BadExample for an example that cannot be read, IndexError outside the
    range, and UserError where the whole run must stop.
    """

    class_names: tuple[str, ...]  # empty when unlabelled, or when nothing names the labels
    fields: tuple[str, ...]  # of the examples. All have them, but "text" may be missing in some

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...
    def fingerprint(self) -> str: ...
    def describe(self) -> dict[str, str | int]: ...  # a changed one is shown as a diff

    def problems(self) -> Iterator[str]:
        """What is structurally wrong, a line for each fault, without decoding any image.

        Files that changed, went or are cut off since the source was opened, counts that differ from
        the index, keys that come twice, samples without an image. Reads all headers again, so that
        it takes about as long as building the index. A source too broken says so when opened.
        """
        ...


SOURCES = {
    "tfds": TfdsSource,
    "folder": ImageFolder,
    "arrayrecord": ArrayRecordSource,
    "tar": TarSource,
    "parquet": ParquetSource,
    "synthetic": SyntheticSource,
}


def open_source(kind: str, path: str | os.PathLike, split: str) -> Source:
    """Open a source by the name of its kind, a key of SOURCES.

    Raises:
      UserError: unknown kind, or nothing usable at path.
    """
    if kind not in SOURCES:
        raise UserError(f"data.source={kind!r}: must be one of {sorted(SOURCES)}")
    return SOURCES[kind](path, split)


def open_mixture(parts: Sequence[tuple[str, str, str, float]]) -> Mixture:
    """Open sources given as (kind, path, split, weight), mixed by their weights.

    Raises:
      UserError: as open_source, or weights that are not positive.
    """
    sources = [open_source(kind, path, split) for kind, path, split, _ in parts]
    return Mixture(sources, [weight for *_, weight in parts])
