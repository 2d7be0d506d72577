"""Hugging Face image-text parquet files as a source.

Parquet cannot be read at random: an example costs its whole row group, decompressed. The groups
last used are kept, within a fixed amount of memory, which helps where the order follows the files
(in evaluation) and not where it is shuffled. Data read often is better converted to tar shards.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from uta_jax import UserError
from uta_jax.data import BadExample, printable
from uta_jax.data.files import (
    MAX_BYTES,
    OpenFiles,
    checked_index,
    digest,
    is_remote,
    open_file,
    unreadable,
)
from uta_jax.data.shards import Shard, find_shards, sample_bytes, some

CACHE_BYTES = 2**28  # of decompressed row groups, in each process
LARGE_GROUP = 2**27  # bytes of image and text: worth a word from problems()
_OPEN_FILES = 32
_THREADS = 16
_IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes")
_TEXT_NAMES = ("text", "caption", "txt", "captions")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class _Columns:
    """Which columns of a schema hold image, text and label, and the names of its classes."""

    image: str
    text: str | None
    label: str | None
    class_names: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.image, self.text, self.label) if name]


def _columns(schema, where: str) -> _Columns:
    features = _hf_features(schema)
    images = [name for name, kind in features.items() if _type(kind) == "Image"]
    image = _named(schema, (*_IMAGE_NAMES, *images), _holds_bytes)
    if image is None:
        raise UserError(
            f"{where}: no image column, only {some(schema.names)}; wanted bytes, or a struct "
            f"of bytes and path, of the type Image or named {', '.join(_IMAGE_NAMES)}"
        )
    label = _named(schema, _LABEL_NAMES, _holds_numbers)
    kind = features.get(label) or {}
    names = kind.get("names") if _type(kind) == "ClassLabel" else None
    class_names = tuple(map(str, names or ()))
    return _Columns(image, _named(schema, _TEXT_NAMES, _holds_text), label, class_names)


def _type(kind) -> str | None:
    return kind.get("_type") if isinstance(kind, dict) else None


def _hf_features(schema) -> dict:
    """What the library datasets wrote into the schema, or nothing."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(about["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _named(schema, names: Sequence[str], fits) -> str | None:
    return next((n for n in names if n in schema.names and fits(schema.field(n).type)), None)


def _holds_bytes(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_numbers(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind)


def _open(path: str):
    import pyarrow.parquet as pq

    return pq.ParquetFile(open_file(path) if is_remote(path) else path)


def _open_shared(path: str):
    """A file, and the lock to read it under: threads would move one another's place in it."""
    return _open(path), threading.Lock()


class _Groups:
    """Row groups by number, the last few kept. Can be pickled; safe in threads and after a fork."""

    def __init__(self, places: Sequence[tuple[str, int]], columns: list[str]):
        self.places, self._columns = places, columns
        self._files = OpenFiles(_open_shared, _OPEN_FILES)
        self._start()

    def _start(self):
        self._tables: OrderedDict = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __getstate__(self):
        return {k: self.__dict__[k] for k in ("places", "_columns", "_files")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __getitem__(self, number: int):
        if self._pid != os.getpid():
            self._start()  # before the lock, which a thread left behind may hold
        with self._lock:
            if number in self._tables:
                self._tables.move_to_end(number)
                return self._tables[number]
        table = self._read(*self.places[number])
        with self._lock:
            self._tables[number] = table
            # The newest always stays: its own example is about to be read from it.
            while len(self._tables) > 1 and self._bytes() > CACHE_BYTES:
                self._tables.popitem(last=False)
        return table

    def _bytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def _read(self, path: str, group: int):
        import pyarrow as pa

        try:
            file, lock = self._files(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(unreadable(path, error)) from None
        try:
            with lock:
                # Without Arrow's own threads: the loader has its own, and a fork would lose them.
                return file.read_row_group(group, self._columns, use_threads=False)
        except MemoryError:
            raise UserError(
                f"{path}: no memory for row group {group}; lower data.workers, or write the file "
                "again with smaller row groups"
            ) from None
        except (OSError, pa.ArrowException) as error:
            # Damaged data comes as an OSError, too, but a plain one without a number.
            plain = type(error) is OSError and not error.errno and not is_remote(path)
            if isinstance(error, OSError) and not plain:
                raise UserError(unreadable(path, error)) from None
            raise BadExample(f"{path}: row group {group} cannot be read ({error})") from None


class ParquetSource:
    """Rows of parquet files: an image column (bytes, or struct of bytes and path), and where there
    are such columns, text (a string; of a list of strings the first) and label (an integer; class
    names from the Hugging Face schema)."""

    def __init__(self, path: str | os.PathLike, split: str = ""):
        """Open the files of `path`: a directory, a glob, braces {00000..00007}, or a URL of these.

        Args:
          split: in a directory, a sub-directory or what the files' names start with ("train").

        Raises:
          UserError: no files, missing or damaged ones (all of them named), columns that differ
            between files, no image column, or no rows.
        """
        self._about = {"kind": "parquet", "path": os.fspath(path), "split": split}
        self._shards = find_shards(path, split, (".parquet",)).files
        footers = _footers(path, self._shards)
        self._columns = footers[0].columns
        self._largest = max(footer.largest for footer in footers)
        self._starts = np.cumsum([0, *(rows for footer in footers for rows in footer.rows)])
        pairs = zip(self._shards, footers, strict=True)
        places = [(shard.path, n) for shard, footer in pairs for n in range(len(footer.rows))]
        self._groups = _Groups(places, self._columns.wanted)
        self._names = {shard.path: printable(shard.name) for shard in self._shards}
        if not len(self):
            raise UserError(f"data.path={path}: {len(self._shards)} files without a row")
        self.class_names = self._columns.class_names
        has = {"text": self._columns.text, "label": self._columns.label}
        self.fields = ("image", "key", *(name for name, column in has.items() if column))
        self._contents = [footer.content for footer in footers]
        parts = [(s.name, s.size, c) for s, c in zip(self._shards, self._contents, strict=True)]
        about = (parts, self._columns.wanted, self.class_names, sample_bytes(self._shards))
        self._fingerprint = digest("parquet", *about)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict:
        index = checked_index(index, len(self))
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        path, number = self._groups.places[group]
        row = index - int(self._starts[group])
        key = f"{self._names[path]}/{number}/{row}"
        rows = self._rows(group)
        try:
            values = {name: column[row].as_py() for name, column in rows}
        except ValueError as error:  # text that is no UTF-8
            raise BadExample(f"{key}: {error}") from None
        example = {"image": _image(values[self._columns.image], key), "key": key}
        text = values.get(self._columns.text)
        text = next(iter(text), None) if isinstance(text, list) else text
        if text is not None:
            example["text"] = text
        if self._columns.label:
            example["label"] = values[self._columns.label]
            if example["label"] is None:
                raise BadExample(f"{key}: no {self._columns.label}")
        return example

    def _rows(self, group: int):
        table = self._groups[group]
        return zip(table.column_names, table.columns, strict=True)

    def fingerprint(self) -> str:
        """Of the files' names and sizes, the sizes of all columns in their row groups, and a sample
        of their bytes."""
        return self._fingerprint

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        groups = len(self._starts) - 1
        counts = {"examples": len(self), "shards": len(self._shards), "row groups": groups}
        return self._about | counts

    def problems(self) -> Iterator[str]:
        """Files that are damaged or changed since they were opened; row groups that are large."""
        for shard, content in zip(self._shards, self._contents, strict=True):
            found = _footer(shard)
            if isinstance(found, str):
                yield f"{shard.name}: {found}"
            elif found.content != content:
                yield f"{shard.name}: not what was opened, {sum(found.rows)} rows now"
        if self._largest > LARGE_GROUP:
            yield (
                f"row groups of up to {self._largest >> 20} MiB, read whole for every example: "
                "write the files again with smaller ones, or as tar shards"
            )


def _image(value, key: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        path = value.get("path") if isinstance(value, dict) else None
        raise BadExample(f"{key}: no image bytes" + (f", only the path {path!r}" if path else ""))
    if len(data) > MAX_BYTES:
        raise BadExample(f"{key}: {len(data)} bytes, at most {MAX_BYTES}")
    return data


class _Footer(NamedTuple):
    """What is kept of a file's footer; all of it, for thousands of files, would take gigabytes."""

    columns: _Columns
    rows: tuple[int, ...]  # of each row group
    largest: int  # bytes of its largest row group
    content: str


def _footer(shard: Shard) -> _Footer | str:
    """The footer of a file, or what is wrong with it."""
    import pyarrow as pa

    try:
        with _open(shard.path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            return _Footer(
                _columns(file.schema_arrow, shard.name),
                tuple(group.num_rows for group in groups),
                max((group.total_byte_size for group in groups), default=0),
                _content(groups),
            )
    except (OSError, pa.ArrowException) as error:
        return printable(f"cut off or damaged ({error})")


def _footers(path: str | os.PathLike, shards: Sequence[Shard]) -> list[_Footer]:
    footers, bad = [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, found in zip(shards, pool.map(_footer, shards), strict=True):
            if isinstance(found, str):
                bad.append(f"{shard.name}: {found}")
                continue
            first = footers[0].columns if footers else found.columns
            if found.columns != first:
                raise UserError(
                    f"data.path={path}: {shard.name} has columns {found.columns.wanted} or class "
                    f"names that differ from the first file's {first.wanted}"
                )
            footers.append(found._replace(columns=first))  # one copy of the class names
    if bad:
        raise UserError(f"data.path={path}: {len(bad)} files cannot be used: {some(bad)}")
    return footers


def _content(groups) -> str:
    """A hash of the sizes in the footer; compressed, they change with almost any value."""
    hashed = hashlib.sha256()
    for group in groups:
        hashed.update(b"%d;" % group.num_rows)
        for column in map(group.column, range(group.num_columns)):
            sizes = column.total_compressed_size, column.total_uncompressed_size
            hashed.update(b"%d,%d;" % sizes)
    return hashed.hexdigest()[:32]
