"""Weights on disk: checked before they are opened, read lazily, written whole or not at all."""

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uta_jax import UserError

# Types of tensors that are read, by the names of safetensors.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CHUNK = 1 << 19  # elements that are read at once, few enough to stay in the cache
TORCH_FILES = (".pt", ".pth", ".bin")
_BLOCK = 1 << 20  # bytes
# Every file that an export or a conversion writes: overwriting replaces these and nothing else.
WRITTEN = frozenset(
    {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "spec.json",
        "weights.safetensors",
        "uta.safetensors",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
    }
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file as plain little-endian numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int  # of its first byte
    strides: tuple[int, ...] | None = None  # in elements; None: C order without gaps

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fill float32 ``out`` [n], C-contiguous, with the elements from ``start`` in C order."""
        if self.strides is not None:
            out[...] = self._gather()[start : start + len(out)]
            return
        offset = self.offset + start * self.dtype.itemsize
        if self.dtype == np.float32:
            _pread(self.file, out, offset)
            return
        values = np.empty(len(out), self.dtype)
        _pread(self.file, values, offset)
        out[...] = values

    def _gather(self) -> np.ndarray:
        """All elements in C order, of a tensor with another one: a transposed view, say."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        span = np.empty(last + 1 if self.size else 0, self.dtype)
        _pread(self.file, span, self.offset)
        steps = [stride * span.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(span, self.shape, steps).reshape(-1)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = np.empty(self.size, self.dtype)
        if self.strides is None:
            _pread(self.file, values, self.offset)
        else:
            values = self._gather()
        return values.reshape(self.shape).astype(dtype or self.dtype, copy=False)


# What a table of keys reads from: a tensor in a file, or in memory.
Tensor = StoredTensor | np.ndarray


def read_into(out: np.ndarray, tensor: Tensor, start: int = 0) -> bool:
    """Fill float32 ``out`` [n] from element ``start`` of ``tensor``; whether all are finite."""
    finite = True
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is told
        if not isinstance(tensor, StoredTensor):
            out[...] = np.asarray(tensor).reshape(-1)[start : start + len(out)]
        elif tensor.strides is not None:
            tensor.read_into(out, start)
        for i in range(0, len(out), CHUNK):
            if isinstance(tensor, StoredTensor) and tensor.strides is None:
                tensor.read_into(out[i : i + CHUNK], start + i)
            finite &= bool(np.isfinite(out[i : i + CHUNK]).all())
    return finite


def _pread(path: Path, out: np.ndarray, offset: int) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))
    file = os.open(path, os.O_RDONLY)
    try:
        while view:
            done = os.preadv(file, [view], offset)
            if not done:
                raise OSError(f"{path}: ends before its last tensor does")
            view, offset = view[done:], offset + done
    finally:
        os.close(file)


def open_weights(*paths: Path) -> dict[str, Tensor]:
    """The tensors of one ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, or of all shards.

    Raises UserError naming the file that is missing, empty, damaged, or no weights file at all.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        check_file(path)
        if path.suffix in TORCH_FILES:
            from uta_jax.interop.torch_files import open_torch

            tensors |= open_torch(path)
        else:
            tensors |= _open_safetensors(path)
    return _without_prefix(tensors)


def _without_prefix(tensors: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Names without what torch's DataParallel puts before every one of them."""
    if not tensors or not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): x for name, x in tensors.items()}


def check_file(path: Path) -> None:
    """Raise UserError for what is often found in the place of weights."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    text = head.lstrip()
    if not head:
        raise UserError(f"{path}: the file is empty")
    if not head.strip(b"\0"):
        raise UserError(f"{path}: begins with zeros: what was written there never reached the disk")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the weights: run `git lfs pull`")
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: an HTML page, not weights: download the file itself")


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Checks the header against the size of the file: without gaps, overlaps or a missing end.
        with safe_open(path, "numpy", backend="pread") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors file ({error})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} is {entry['dtype']}, which is not read ({', '.join(DTYPES)} are)"
            )
    return {
        name: StoredTensor(
            tuple(entry["shape"]),
            np.dtype(DTYPES[entry["dtype"]]),
            path,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is missing or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Indented, with a closing newline."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write C-contiguous arrays and read the file again; its sha256.

    Raises OSError where one bit of it is not what was given.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers asks for this word
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    with safe_open(path, "numpy", backend="pread") as file:
        names = file.offset_keys()
        if {n: tuple(file.get_slice(n).get_shape()) for n in names} != _shapes(tensors):
            raise OSError("other tensors were written")
    # What the file must hash to, piece by piece: comparing takes no memory, however large it is.
    with path.open("rb") as file:
        head = file.read(8)
        expected = hashlib.sha256(head + file.read(int.from_bytes(head, "little")))
    for name in names:
        expected.update(tensors[name])
    if sha256(path) != expected.hexdigest():
        raise OSError("what was written reads differently")
    return expected.hexdigest()


class SafetensorsWriter:
    """A file of float32 tensors, filled piece by piece in any order, from any thread."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        """``shapes``: of every tensor by name, in the order of the file."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(self._head) + header[name]["data_offsets"][0] for name in shapes}
        self._end = len(self._head) + end
        self._pieces: dict[int, tuple[int, int]] = {}  # first byte -> how many, their checksum
        self._path = path
        self._file = path.open("w+b", buffering=0)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def put(self, name: str, start: int, values: np.ndarray) -> None:
        """Write float32, C-contiguous ``values`` from element ``start`` of tensor ``name``."""
        self._write(self._starts[name] + 4 * start, memoryview(values.reshape(-1).view(np.uint8)))

    def _write(self, offset: int, data: memoryview) -> None:
        self._pieces[offset] = len(data), zlib.crc32(data)
        while data:
            done = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[done:], offset + done

    def finish(self) -> str:
        """Write the head, read everything again; the sha256. Raises OSError for what was lost."""
        self._write(0, memoryview(self._head))
        os.fsync(self._file.fileno())
        digest, offset = hashlib.sha256(), 0
        for start, (length, checksum) in sorted(self._pieces.items()):
            found = 0
            if start != offset:
                raise OSError(f"{self._path}: nothing was written from byte {offset} on")
            for offset in range(start, start + length, _BLOCK):
                block = os.pread(self._file.fileno(), min(_BLOCK, start + length - offset), offset)
                found = zlib.crc32(block, found)
                digest.update(block)
            if found != checksum:
                raise OSError("what was written reads differently")
            offset = start + length
        if offset != self._end or os.fstat(self._file.fileno()).st_size != offset:
            raise OSError(f"{self._path}: has not the size that its head tells")
        return digest.hexdigest()


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def sha256(*paths: Path) -> str:
    """Hex digest of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise UserError where something already lies at ``directory`` and may not be replaced.

    ``overwrite`` allows to replace an earlier export or conversion, never a run or another folder.
    """
    try:
        directory.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # of a name that is too long, or holds a NUL, say
        raise UserError(f"{str(directory)!r}: cannot be written ({error})") from None
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file or a dead link; give a directory")
    if not overwrite:
        raise UserError(f"{directory}: already exists; remove it or ask for overwrite")
    strangers = [p.name for p in directory.iterdir() if p.name not in WRITTEN or not p.is_file()]
    if strangers:
        raise UserError(
            f"{directory}: not overwritten, for it holds {min(strangers)!r}, which no export or "
            "conversion writes; give another directory"
        )


@contextmanager
def whole_dir(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to fill, which becomes ``directory`` at the end, or leaves no trace."""
    check_free(directory, overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new.", dir=directory.parent) as near:
            work, old = Path(near) / "new", Path(near) / "old"
            work.mkdir()
            yield work
            check_free(directory, overwrite)  # again: writing takes a while
            try:
                if directory.exists():
                    directory.rename(old)
                work.rename(directory)
            except BaseException:
                if old.exists():
                    old.rename(directory)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: nothing written ({error})") from error
