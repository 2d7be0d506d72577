"""What a conversion would do with each tensor, as a table for people; no weight is read."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import Tensor
from uta_jax.interop.find import find, identify
from uta_jax.interop.teacher import at_size, check_digest
from uta_jax.models.presets import ClipSpec

# Facebook's directories of DINOv2 store positions for 518 pixels; their processors crop 224.
NOTE = (
    "note: images enter at {} px, the size of the positions; transformers crops to the size of "
    "its processor, and interpolates them in its own way: its features differ"
)
TITLES = ("theirs", "shape", "dtype", "ours", "rule")


def listing(
    src: str | Path, fmt: str = "", preset: str = "", image_size: int = 0, digest: str = ""
) -> Iterator[str]:
    """Lines: the format, each tensor with where it goes and how, then the specification.

    ``src``, ``fmt``, ``preset``, ``image_size``: as ``load_clip``. ``digest``: the sha256 that the
    weights must have; for it alone their files are read. Raises UserError, after the table, where
    the tensors are not those of the specification.
    """
    found, tensors = identify(find(src, fmt, preset), preset)
    spec = at_size(found.spec, image_size, src)
    if digest:
        check_digest(found, digest)
    yield f"{src}: {translate.FORMATS[found.fmt].title} ({found.fmt})"
    reasons = translate.misfits(found.fmt, found.spec)
    rows = [TITLES, *_rows(found.fmt, found.spec, tensors)] if not reasons else [TITLES]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for name, value in _fields(spec):
        yield f"{name} = {value!r}"
    if found.fmt == "hf_dinov2":
        yield NOTE.format(spec.vision.image_size)
    try:
        translate.check_tensors(found.fmt, found.spec, tensors)
        translate.check_tables(found.fmt, found.spec, tensors)
    except UserError as error:
        raise UserError(f"{found.where}: {error}") from None


def _rows(
    fmt: str, spec: ClipSpec, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, str, str, str]]:
    used = set()
    for name, row, block in translate.names(fmt, spec):
        used.add(name)
        place = "" if block is None else f"[{block}]"
        yield (name, *_kind(tensors.get(name)), _paths(row.paths) + place, row.rule)
    dropped = translate.dropped(fmt, spec, tensors)
    for name in tensors:
        if name not in used:
            fate = "dropped" if name in dropped else "UNEXPECTED"
            yield (name, *_kind(tensors[name]), fate, "")


def _paths(paths: tuple[str, ...]) -> str:
    """One path, or several that differ in one name: attn/{q,k,v}/kernel."""
    parts = [dict.fromkeys(names) for names in zip(*(x.split("/") for x in paths), strict=True)]
    return "/".join(f"{{{','.join(x)}}}" if len(x) > 1 else next(iter(x)) for x in parts)


def _kind(tensor: Tensor | None) -> tuple[str, str]:
    return ("MISSING", "") if tensor is None else (str(tuple(tensor.shape)), str(tensor.dtype))


def _fields(spec: ClipSpec) -> Iterator[tuple[str, object]]:
    """Every field of a specification, those of the towers under their names."""
    for name, value in asdict(spec).items():
        if isinstance(value, dict):
            yield from ((f"{name}.{field}", x) for field, x in value.items())
        else:
            yield name, value
