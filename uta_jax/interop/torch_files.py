"""Tensors of PyTorch's own files, whose pickles are never executed."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uta_jax import UserError
from uta_jax.interop.files import DTYPES, StoredTensor, Tensor

# Where training scripts put the state dict among other things, in the order in which we look.
WRAPPERS = ("state_dict", "module", "model")
# Their types -> those of safetensors.
_TYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16",
    "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # what torch says of a name that it refuses to import


def open_torch(path: Path) -> dict[str, Tensor]:
    """Name -> tensor; of the usual zip files nothing but the names is read yet.

    Raises UserError for anything but tensors by name, perhaps under one of ``WRAPPERS``.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs `pip install 'uta-jax[torch]'` (.safetensors does not)"
        ) from None
    try:
        lazy = _is_plain_zip(path)
        with warnings.catch_warnings(action="ignore"):  # of damaged files it says more lines
            # weights_only: nothing of the pickle is ever executed, and there is no way round it.
            state = torch.load(path, "meta" if lazy else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_refusal(str(error))}") from None
    except UserError:
        raise
    except Exception as error:  # weights_only: whatever it is, what was read is damaged
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"{path}: truncated or damaged, or no weights file ({type(error).__name__}: {reason})"
        ) from None
    found = _state_dict(path, state)
    return {name: _tensor(path, name, x, lazy) for name, x in found.items()}


def _is_plain_zip(path: Path) -> bool:
    """Whether its numbers lie in the file as they are: PyTorch since 1.6 writes such zip files."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated: the directory at its end is missing")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(
                f"{path}: a TorchScript archive, which is a program and is never executed: give "
                "the same weights as a state dict (OpenAI's: hf-hub:openai/clip-vit-base-patch16)"
            )
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return plain and all(archive.read(name) == b"little" for name in orders)


def _refusal(error: str) -> str:
    """What to say of a pickle that asks for more than tensors."""
    found = _GLOBAL.search(error)
    if not found:
        return "truncated or damaged, or no weights file (its pickle cannot be read)"
    name = found[1]
    what = "pickled arguments" if name.endswith("Namespace") else "pickled Python objects"
    return (
        f"holds {what} ({name}), which could run any code and are never executed; "
        "save the bare state dict, or safetensors"
    )


def _state_dict(path: Path, state: Any) -> Mapping[str, Any]:
    import torch

    def tensors_by_name(x: Any) -> bool:
        return (
            isinstance(x, Mapping)
            and len(x) > 0
            and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in x.items())
        )

    inner = state if isinstance(state, Mapping) else {}
    for found in (state, *(inner.get(name) for name in WRAPPERS)):
        if tensors_by_name(found):
            return found
    raise UserError(
        f"{path}: holds no state dict (names -> tensors), bare or as one of {', '.join(WRAPPERS)}"
    )


def _tensor(path: Path, name: str, x: Any, lazy: bool) -> Tensor:
    dtype = _TYPES.get(str(x.dtype))
    if dtype is None or str(x.layout) != "torch.strided":
        raise UserError(f"{path}: {name} is {x.dtype}, {x.layout}, which is not read")
    if not lazy:
        return x.detach().float().numpy()
    storage = x.untyped_storage()
    if storage._checkpoint_offset + storage.nbytes() > path.stat().st_size:
        raise UserError(f"{path}: truncated: {name} lies behind its end")
    offset = storage._checkpoint_offset + x.storage_offset() * x.element_size()
    strides = None if x.is_contiguous() else tuple(x.stride())
    return StoredTensor(tuple(x.shape), np.dtype(DTYPES[dtype]), path, offset, strides)
