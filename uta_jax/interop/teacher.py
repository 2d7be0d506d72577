"""A path -> the CLIP that lies there: specification, float32 parameters and provenance.

What is read: every format of ``keymaps``, as ``interop/find.py`` finds it. Every mistake is one
line naming the file, before anything is compiled.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import (
    SafetensorsWriter,
    Tensor,
    check_free,
    sha256,
    whole_dir,
    write_json,
    write_safetensors,
)
from uta_jax.interop.find import SPEC_FILE, WEIGHTS_FILE, Found, find, identify
from uta_jax.models.presets import ClipSpec, resized, with_vision


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP in memory. ``params``: nested dicts of float32 numpy arrays, of any memory order."""

    spec: ClipSpec
    params: dict
    tokenizer_file: Path | None  # that ``spec.tokenizer`` names, if it lies beside the weights
    hashed: Callable[[], dict[str, str]]

    @property
    def provenance(self) -> dict[str, str]:
        """Name, format and sha256 of the weights as they were published.

        Hashing takes longer than loading: it goes on beside, and who asks waits for it.
        """
        return self.hashed()

    @property
    def tokenizer_context(self) -> int:
        """Tokens of a text; 0 for a vision tower alone."""
        return self.spec.text.context if self.spec.text else 0


def load_clip(path: str | Path, image_size: int = 0, fmt: str = "", preset: str = "") -> Checkpoint:
    """Read the CLIP at ``path``: a directory or file of any format, ``asset:NAME``,
    ``hf-hub:org/name[@revision]`` or ``open_clip:ARCHITECTURE/TAG``.

    Args:
      path: see above.
      image_size: > 0 resamples the learned positions for that input size.
      fmt: a key of ``keymaps.FORMATS``; empty: by the configuration, or the tensors' names.
      preset: the architecture (``find.PRESETS``) of weights that have no configuration.

    Raises UserError for anything missing, damaged, of another architecture, or not finite.
    """
    found, tensors = identify(find(path, fmt, preset), preset)
    spec = at_size(found.spec, image_size, path)
    pool = ThreadPoolExecutor(1)
    digest = pool.submit(check_digest, found)
    pool.shutdown(wait=False)
    with _naming(found, UserError, OSError):
        params = translate.to_ours(found.fmt, found.spec, tensors)
        if found.sha256:  # on record: nothing is used before it is checked
            digest.result()
    if spec != found.spec:
        vision = params["vision"]
        vision["pos_embed"] = resample_positions(
            vision["pos_embed"], spec.vision.grid, spec.vision.cls
        )

    def hashed() -> dict[str, str]:
        with _naming(found, UserError, OSError):
            return _provenance(str(path), found, digest.result())

    return Checkpoint(spec, params, _tokenizer_file(spec, found), hashed)


def _provenance(path: str, found: Found, digest: str) -> dict[str, str]:
    """Of what is on record already, that; a repository on a hub is named with its commit."""
    if found.source:
        return dict(found.source)
    folder, name = found.weights[0].parent, path
    if not path.startswith(("asset:", "hf-hub:", "open_clip:")):
        name = Path(path).resolve().name
    elif path.startswith("hf-hub:") and folder.parent.name == "snapshots":
        name = f"{path.partition('@')[0]}@{folder.name}"
    return {"name": name, "format": found.fmt, "sha256": digest}


def read_spec(path: str | Path, fmt: str = "", preset: str = "") -> ClipSpec:
    """The specification of the CLIP at ``path``, without reading its weights."""
    found = find(path, fmt, preset)
    return found.spec or identify(found, preset)[0].spec


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    spec: ClipSpec
    provenance: dict[str, str]


def convert(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    *,
    fmt: str = "",
    preset: str = "",
    image_size: int = 0,
    digest: str = "",
) -> Converted:
    """Write the CLIP at ``src`` as our own directory ``dst``: float32 weights and ``spec.json``.

    Tensors pass through memory one by one, however large the file is. ``src``, ``fmt``, ``preset``,
    ``image_size``: as ``load_clip``. ``digest``: the sha256 that the weights must have.

    ``dst`` appears whole or not at all. Raises UserError where it exists, unless ``overwrite``.
    """
    dst = Path(dst)
    check_free(dst, overwrite)
    found, tensors = identify(find(src, fmt, preset), preset)
    spec = at_size(found.spec, image_size, src)
    with _naming(found, UserError):
        translate.check_tensors(found.fmt, found.spec, tensors)
        translate.check_tables(found.fmt, found.spec, tensors)
    with whole_dir(dst, overwrite) as work, ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(check_digest, found, digest)
        with _naming(found, UserError):
            written = _stream(found, tensors, spec, work / WEIGHTS_FILE)
        if tokenizer := _tokenizer_file(spec, found):
            shutil.copyfile(tokenizer, work / spec.tokenizer)
        provenance = _provenance(str(src), found, hashed.result())
        _record(work, "uta_jax", WEIGHTS_FILE, written, spec, {"source": provenance})
    return Converted(spec, provenance)


def write_recorded(
    folder: Path,
    fmt: str,
    name: str,
    tensors: Mapping[str, np.ndarray],
    spec: ClipSpec,
    origin: Mapping[str, Any],
) -> None:
    """Weights, and beside them ``spec.json``: what they do not say, and where they came from."""
    _record(folder, fmt, name, write_safetensors(folder / name, tensors), spec, origin)


def resample_positions(pos_embed: np.ndarray, grid: int, cls: bool = True) -> np.ndarray:
    """Learned positions [1 + n, d], CLS first, or [n, d] for a ``grid`` x ``grid`` image.

    Bicubic (a = -0.5), widened when shrinking, CLS untouched: open_clip, ``resize_pos_embed``.
    ``cls``: whether there is a row for CLS. Raises UserError where the others are no square.
    """
    first = int(cls)
    old = isqrt(len(pos_embed) - first)
    if old * old != len(pos_embed) - first:
        raise UserError(f"{len(pos_embed)} positions, cls={cls}, are those of no square image")
    if old == grid:
        return pos_embed
    weights = _cubic_weights(old, grid)
    table = pos_embed[first:].reshape(old, old, -1).astype(np.float64)
    table = np.einsum("ir,jc,rcd->ijd", weights, weights, table, optimize=True)
    table = table.reshape(grid * grid, -1).astype(pos_embed.dtype)
    return np.concatenate([pos_embed[:first], table])


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """[new, old]: how much each old cell gives to each new one."""
    scale = old / new
    centre = (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(np.arange(old)[None] + 0.5 - centre) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _record(
    folder: Path, fmt: str, name: str, digest: str, spec: ClipSpec, origin: Mapping[str, Any]
) -> None:
    record = {"format": fmt, "weights": name, "sha256": digest, "spec": asdict(spec)}
    write_json(folder / SPEC_FILE, {**record, **origin})


def _stream(found: Found, tensors: Mapping[str, Tensor], spec: ClipSpec, path: Path) -> str:
    """Write the parameters of ``found`` at the size of ``spec``; the sha256 of the file."""
    with SafetensorsWriter(path, translate.param_shapes(spec)) as writer:

        def put(name: str, start: int, values: np.ndarray) -> None:
            if name == "vision/pos_embed":
                values = resample_positions(values, spec.vision.grid, spec.vision.cls)
            writer.put(name, start, values)

        translate.stream_ours(found.fmt, found.spec, tensors, put)
        return writer.finish()


def at_size(spec: ClipSpec, image_size: int, path: str | Path) -> ClipSpec:
    """``spec`` for another input size (0: its own); UserError where no patches fill that."""
    size = image_size or spec.vision.image_size
    if size % spec.vision.patch_size or size < 1:
        raise UserError(
            f"image_size={size} for {path}: its patch size {spec.vision.patch_size} must divide it"
        )
    return with_vision(spec, resized(spec.vision, size))


def check_digest(found: Found, wanted: str = "") -> str:
    """The sha256 of the weights; UserError if it is not the one wanted, or on record."""
    digest = sha256(*found.weights)
    for expected, where in ((wanted.lower(), "wanted"), (found.sha256, f"in {SPEC_FILE}")):
        if expected not in ("", digest):
            raise UserError(
                f"{found.where}: weights are damaged, or others: their sha256 is {digest}, not "
                f"the {expected} {where}"
            )
    return digest


def _tokenizer_file(spec: ClipSpec, found: Found) -> Path | None:
    path = found.weights[0].parent / spec.tokenizer
    return path if spec.tokenizer != "clip" and path.is_file() else None


@contextmanager
def _naming(found: Found, *errors: type[Exception]) -> Iterator[None]:
    """What goes wrong in the middle of reading names the checkpoint, too."""
    try:
        yield
    except errors as error:
        raise UserError(f"{found.where}: {error}") from None
