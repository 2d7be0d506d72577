"""A path -> the CLIP that lies there: specification, float32 parameters and provenance.

What is read: a Hugging Face CLIP directory; a released UTA state dict (``.safetensors`` or
``.pt``; with our JSON beside it also of other sizes); a directory written by ``convert``; and
``asset:NAME``, which ships with the package. Every mistake is one line naming the file, before
anything is compiled.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import resources
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import (
    StoredTensor,
    check_free,
    open_weights,
    read_json,
    sha256,
    whole_dir,
    write_json,
    write_safetensors,
)
from uta_jax.interop.hf_config import hf_spec
from uta_jax.interop.specs import spec_from_json
from uta_jax.models.presets import CLIP, VIT, ClipSpec, resized

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "weights.safetensors"

RELEASED = ("uta_b16", "uta_l14_336", "uta_g14_336")


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP in memory. ``params``: nested dicts of float32 numpy arrays."""

    spec: ClipSpec
    params: dict
    tokenizer_context: int
    provenance: dict[str, str]  # name, format, sha256 of the weights as they were published


@dataclass(frozen=True)
class _Found:
    """Where a checkpoint lies, before any weight is read."""

    where: str
    fmt: str
    weights: tuple[Path, ...]
    spec: ClipSpec | None  # None: to be told from the shapes
    sha256: str = ""  # what the weights must hash to, where that is on record
    source: Mapping[str, str] | None = None  # provenance on record


def load_clip(path: str | Path, image_size: int = 0) -> Checkpoint:
    """Read the CLIP at ``path``; ``image_size`` > 0 resamples its positions for that input size.

    Raises UserError for anything missing, damaged, of another architecture, or not finite.
    """
    found = _find(path)
    tensors = open_weights(*found.weights)
    spec = found.spec or released_spec(found.where, tensors)
    size = image_size or spec.vision.image_size
    if size % spec.vision.patch_size:
        raise UserError(
            f"image_size={size} for {path}: its patch size {spec.vision.patch_size} must divide it"
        )
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256, *found.weights)  # a second core reads along
        params = _to_ours(found, spec, tensors)
    if found.sha256 and found.sha256 != digest.result():
        raise UserError(f"{found.where}: weights are damaged (sha256 differs from {SPEC_FILE})")
    if size != spec.vision.image_size:
        spec = replace(spec, vision=resized(spec.vision, size))
        vision = params["vision"]
        vision["pos_embed"] = resample_positions(vision["pos_embed"], spec.vision.grid)
    provenance = {"name": _name(path), "format": found.fmt, "sha256": digest.result()}
    return Checkpoint(spec, params, spec.text.context, dict(found.source or provenance))


def read_spec(path: str | Path) -> ClipSpec:
    """The specification of the CLIP at ``path``, without reading its weights."""
    found = _find(path)
    return found.spec or released_spec(found.where, open_weights(*found.weights, peek=True))


def convert(src: str | Path, dst: str | Path, overwrite: bool = False) -> Checkpoint:
    """Write the CLIP at ``src`` as our own directory ``dst``: float32 weights and ``spec.json``.

    ``dst`` appears whole or not at all. Raises UserError where it exists, unless ``overwrite``.
    """
    dst = Path(dst)
    check_free(dst, overwrite)
    checkpoint = load_clip(src)
    with whole_dir(dst, overwrite) as work:
        tensors = translate.to_theirs("uta_jax", checkpoint.spec, checkpoint.params)
        origin = {"source": checkpoint.provenance}
        write_recorded(work, "uta_jax", WEIGHTS_FILE, tensors, checkpoint.spec, origin)
    return checkpoint


def write_recorded(
    folder: Path,
    fmt: str,
    name: str,
    tensors: Mapping[str, np.ndarray],
    spec: ClipSpec,
    origin: Mapping[str, Any],
) -> None:
    """Weights, and beside them ``spec.json``: what they do not say, and where they came from."""
    digest = write_safetensors(folder / name, tensors)
    record = {"format": fmt, "weights": name, "sha256": digest, "spec": asdict(spec)}
    write_json(folder / SPEC_FILE, {**record, "tokenizer": "clip", **origin})


def resample_positions(pos_embed: np.ndarray, grid: int) -> np.ndarray:
    """Learned positions [1 + n, d], CLS first, for a ``grid`` x ``grid`` image.

    Bicubic (a = -0.5), widened when shrinking, CLS untouched: open_clip, ``resize_pos_embed``.
    """
    old = isqrt(len(pos_embed) - 1)
    if old == grid:
        return pos_embed
    weights = _cubic_weights(old, grid)
    table = pos_embed[1:].reshape(old, old, -1).astype(np.float64)
    table = np.einsum("ir,jc,rcd->ijd", weights, weights, table, optimize=True)
    table = table.reshape(grid * grid, -1).astype(pos_embed.dtype)
    return np.concatenate([pos_embed[:1], table])


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """[new, old]: how much each old cell gives to each new one."""
    scale = old / new
    centre = (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(np.arange(old)[None] + 0.5 - centre) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _to_ours(found: _Found, spec: ClipSpec, tensors: Mapping[str, StoredTensor]) -> dict:
    try:
        return translate.to_ours(found.fmt, spec, tensors)
    except (UserError, SafetensorError, OSError) as error:
        raise UserError(f"{found.where}: {error}") from None


# Finding a checkpoint


def _find(path: str | Path) -> _Found:
    root = _asset(str(path)) if str(path).startswith("asset:") else Path(path)
    if not root.exists():
        raise UserError(f"{path}: no such file or directory")
    if root.is_file():
        return _find_file(root)
    if (root / SPEC_FILE).is_file():
        return _from_record(root / SPEC_FILE)
    if (root / "config.json").is_file():
        return _Found(str(root), "hf_clip", _hf_weights(root), hf_spec(root))
    raise UserError(
        f"{path}: holds neither config.json (Hugging Face CLIP) nor {SPEC_FILE} (uta-jax, UTA)"
    )


def _asset(path: str) -> Path:
    assets = Path(str(resources.files("uta_jax"))) / "assets"
    name = path.removeprefix("asset:")
    names = sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
    if name not in names:
        raise UserError(f"{path}: no such asset; there are: {', '.join(names) or 'none'}")
    return assets / name


def _find_file(path: Path) -> _Found:
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: give a directory, a .safetensors or a .pt file")
    for record in (path.with_suffix(".json"), path.parent / SPEC_FILE):
        if record.is_file():
            return _from_record(record, path)
    return _Found(str(path), "uta", (path,), None)


def _from_record(record: Path, weights: Path | None = None) -> _Found:
    values = read_json(record)
    fmt = values.get("format")
    if fmt not in ("uta", "uta_jax"):
        raise UserError(f"{record}: format={fmt!r} must be 'uta' or 'uta_jax'")
    name = values.get("weights", WEIGHTS_FILE)
    weights = weights or record.parent / _plain(name, record)
    spec = spec_from_json(values.get("spec"), str(record))
    source = values.get("source")
    source = source if isinstance(source, dict) else None
    return _Found(str(record.parent), fmt, (weights,), spec, values.get("sha256", ""), source)


def _hf_weights(root: Path) -> tuple[Path, ...]:
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return (single,)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index}: has no weight_map")
    return tuple(root / name for name in sorted({_plain(x, index) for x in shards.values()}))


def _plain(name: Any, where: Path) -> str:
    """A file name out of a JSON file: it may not lead out of the directory."""
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{where}: {name!r} is not a file name")
    return name


def _name(path: str | Path) -> str:
    return str(path) if str(path).startswith("asset:") else Path(path).resolve().name


def released_spec(where: str, tensors: Mapping[str, StoredTensor]) -> ClipSpec:
    """The released UTA model of this width and patch: what only the code of the authors tells."""
    kernel = tensors.get("visual.patch_embed.proj.weight")
    positions = tensors.get("visual.pos_embed")
    if kernel is None or positions is None or len(kernel.shape) != 4 or len(positions.shape) != 3:
        raise UserError(
            f"{where}: neither a released UTA state dict nor accompanied by a {SPEC_FILE} "
            "(a Hugging Face model is given by its directory)"
        )
    released = {(s.width, s.patch_size): s for s in map(VIT.get, RELEASED)}
    vision = released.get((kernel.shape[0], kernel.shape[-1]))
    if vision is None:
        raise UserError(
            f"{where}: width {kernel.shape[0]} with patch size {kernel.shape[-1]} is none of the "
            f"released UTA models ({', '.join(RELEASED)}): put a {SPEC_FILE} beside it"
        )
    vision = resized(vision, isqrt(positions.shape[1] - 1) * vision.patch_size)
    return ClipSpec(vision, CLIP["eva01_g14_plus"].text)
