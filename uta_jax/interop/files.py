"""Weights on disk: checked before they are opened, read lazily, written whole or not at all."""

import hashlib
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uta_jax import UserError

# Of safetensors' types, those that numpy (with ml_dtypes, for bfloat16) knows.
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


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
    }
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape at once, its values when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def open_weights(*paths: Path, peek: bool = False) -> dict[str, StoredTensor]:
    """The tensors of one ``.safetensors`` or ``.pt`` file, or of all shards, by name.

    ``peek`` promises that only shapes will be asked for. Otherwise each tensor may be read once: of
    a ``.pt``, which comes into memory whole, it is let go then.

    Raises UserError naming the file that is missing, empty, damaged, or no weights file at all.
    """
    tensors = {}
    for path in paths:
        check_file(path)
        tensors |= _open_torch(path, peek) if path.suffix == ".pt" else _open_safetensors(path)
    if tensors and all(name.startswith("module.") for name in tensors):  # torch's DataParallel
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    return tensors


def check_file(path: Path) -> None:
    """Raise UserError for what is often found in the place of weights."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the weights: run `git lfs pull`")
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: an HTML page, not weights: download the file itself")


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        # Memory-mapped pages would count as memory of ours: a file's worth of it.
        file = safe_open(path, "numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged safetensors file ({error})") from None
    tensors = {}
    for name in file.keys():
        entry = file.get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise UserError(f"{path}: {name} is {entry.get_dtype()}, not one of {DTYPES}")
        tensors[name] = StoredTensor(tuple(entry.get_shape()), partial(file.get_tensor, name))
    return tensors


def _open_torch(path: Path, peek: bool) -> dict[str, StoredTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs `pip install 'uta-jax[torch]'`") from None
    try:
        # weights_only: nothing of the pickle is ever executed, and there is no way round it.
        state = torch.load(path, "cpu", weights_only=True, mmap=peek and zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds pickled Python objects, which are never executed, or is damaged; "
            "save the bare state dict, or safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: truncated or damaged .pt file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path}: is not a bare state dict (names -> tensors)")
    return {
        name: StoredTensor(shape, lambda name=name: state.pop(name).float().numpy())
        for name, shape in _shapes(state).items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is missing or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; give a directory")
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
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as near:
        work, old = Path(near) / "new", Path(near) / "old"
        work.mkdir()
        try:
            yield work
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory}: nothing written ({error})") from error
        check_free(directory, overwrite)  # again: writing takes a while
        try:
            if directory.exists():
                directory.rename(old)
            work.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
