"""Weights from a layout of ``keymaps.FORMATS`` to our parameters and back: strict both ways."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from uta_jax import UserError
from uta_jax.interop.keymaps import FORMATS, RULES, Extra, Row
from uta_jax.mesh import path_name
from uta_jax.models.presets import ClipSpec
from uta_jax.models.text import init_text
from uta_jax.models.vit import init_vit

Shape = tuple[int, ...]


def misfits(fmt: str, spec: ClipSpec) -> list[str]:
    """Why format ``fmt`` cannot hold ``spec``, one short reason each; empty where it can."""
    table = FORMATS[fmt]
    towers = (("vision", spec.vision, table.vision), ("text", spec.text, table.text))
    reasons = [
        f"{tower}.{name} = {getattr(part, name)!r} (it holds {' or '.join(map(repr, allowed))})"
        for tower, part, held in towers
        if part is not None
        for name, allowed in held.items()
        if getattr(part, name) not in allowed
    ]
    if not table.rows:
        return reasons
    ours = param_shapes(spec).keys()
    held = {path for row in table.rows for path in row.paths}
    needed = {path for row in table.rows if not row.optional for path in row.paths}
    reasons += [f"it has no place for {path}" for path in sorted(ours - held)]
    return reasons + [f"it needs {path}" for path in sorted(needed - ours)]


def to_ours(fmt: str, spec: ClipSpec, tensors: Mapping[str, Any]) -> dict:
    """Their named tensors -> our nested tree of float32 numpy arrays, whatever dtype they have.

    ``tensors`` may be lazy: what is asked of each is its ``shape``, then once its values. Beside
    the result, one tensor at a time is in memory.

    Raises UserError listing all missing, unexpected and misshaped keys, or all that are not finite.
    """
    _check_fits(fmt, spec)
    extras = {name for name, _ in _extra_names(fmt, spec)}
    found = {name: tuple(x.shape) for name, x in tensors.items() if name not in extras}
    _check_keys(their_shapes(fmt, spec), found, f"format {fmt!r}")
    shapes = param_shapes(spec)
    flat = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    broken = []
    for name, row, block in _names(fmt, spec):
        theirs = np.asarray(tensors[name])
        if not np.isfinite(theirs).all():
            broken.append(name)
        for path, part in zip(row.paths, _split(theirs, len(row.paths)), strict=True):
            slot = flat[path] if block is None else flat[path][block]
            _copy(slot, RULES[row.rule].load(part))
    _check_finite(broken)
    return unflatten(flat)


def to_theirs(fmt: str, spec: ClipSpec, params: Mapping) -> dict[str, np.ndarray]:
    """Our tree -> their names and layouts: float32, C-contiguous (safetensors scrambles others).

    Raises UserError where the format cannot hold ``spec``, or the tree is not that of ``spec`` or
    not finite.
    """
    _check_fits(fmt, spec)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    _check_keys(
        param_shapes(spec), {path: leaf.shape for path, leaf in flat.items()}, "parameter tree"
    )
    _check_finite([path for path, leaf in flat.items() if not np.isfinite(leaf).all()])
    theirs = {}
    for name, row, block in _names(fmt, spec):
        ours = [flat[path] if block is None else flat[path][block] for path in row.paths]
        theirs[name] = _joined(row, ours)
    for name, extra in _extra_names(fmt, spec):
        if extra.make is not None:
            theirs[name] = np.array(extra.make(spec), np.float32, order="C")
    return theirs


@lru_cache
def param_shapes(spec: ClipSpec) -> dict[str, Shape]:
    """Path -> shape of every parameter, as the models themselves make them."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    towers = {"vision": jax.eval_shape(lambda key: init_vit(spec.vision, key), key)}
    if spec.text is not None:
        towers["text"] = jax.eval_shape(lambda key: init_text(spec.text, key), key)
        towers["logit_scale"] = jax.ShapeDtypeStruct((), np.float32)
    if spec.logit_bias:
        towers["logit_bias"] = jax.ShapeDtypeStruct((), np.float32)
    return {path: leaf.shape for path, leaf in flatten(towers).items()}


def flatten(tree: Mapping) -> dict[str, Any]:
    """Nested dicts -> one dict whose keys join the names with "/"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The inverse of ``flatten``."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _split(theirs: np.ndarray, parts: int) -> list[np.ndarray]:
    return np.split(theirs, parts) if parts > 1 else [theirs]


def _joined(row: Row, ours: list[np.ndarray]) -> np.ndarray:
    parts = [RULES[row.rule].save(x) for x in ours]
    if len(parts) == 1 and parts[0].dtype == np.float32 and parts[0].flags.c_contiguous:
        return parts[0]
    first = parts[0].shape
    theirs = np.empty((len(parts) * first[0], *first[1:]), np.float32)
    for slot, part in zip(_split(theirs, len(parts)), parts, strict=True):
        _copy(slot, part)
    return theirs


def _copy(slot: np.ndarray, values: np.ndarray) -> None:
    """Fill a contiguous array, in the order of ``values`` whatever its own shape."""
    slot = slot.reshape(values.shape)
    if values.ndim != 2 or values.flags.c_contiguous:
        slot[...] = values
        return
    # A transposed matrix: strips suit the cache, and fresh memory is best touched in order first.
    slot[...] = 0
    for i in range(0, values.shape[1], 16):
        slot[:, i : i + 16] = values[:, i : i + 16]


def _names(fmt: str, spec: ClipSpec) -> Iterator[tuple[str, Row, int | None]]:
    """(their name, its row, block index or None) for every tensor of ``spec``."""
    shapes = param_shapes(spec)
    for row in FORMATS[fmt].rows or tuple(Row(path, path) for path in shapes):
        if row.optional and not all(path in shapes for path in row.paths):
            continue
        if "{i}" not in row.theirs:
            yield row.theirs, row, None
            continue
        for block in range(shapes[row.paths[0]][0]):
            yield row.theirs.format(i=block), row, block


def _extra_names(fmt: str, spec: ClipSpec) -> Iterator[tuple[str, Extra]]:
    for extra in FORMATS[fmt].extras:
        blocks = range(spec.vision.depth if "{i}" in extra.theirs else 1)
        yield from ((extra.theirs.format(i=block), extra) for block in blocks)


def their_shapes(fmt: str, spec: ClipSpec) -> dict[str, Shape]:
    """Their name -> its shape, by way of the rules themselves: no second account of any layout."""
    shapes = param_shapes(spec)
    theirs = {}
    for name, row, block in _names(fmt, spec):
        whole = shapes[row.paths[0]]
        ghost = np.broadcast_to(np.float32(0), whole if block is None else whole[1:])  # no memory
        first = RULES[row.rule].save(ghost).shape
        parts = len(row.paths)
        theirs[name] = first if parts == 1 else (parts * first[0], *first[1:])
    return theirs


def _check_fits(fmt: str, spec: ClipSpec) -> None:
    if reasons := misfits(fmt, spec):
        raise UserError(f"format {fmt!r} does not fit: {'; '.join(reasons)}")


def _check_finite(broken: list[str]) -> None:
    if broken:
        raise UserError(f"NaN or infinity in {', '.join(sorted(broken))}")


def _check_keys(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raise one UserError that lists every key which is missing, unexpected or misshaped."""
    both = expected.keys() & found.keys()
    problems = {
        "missing": {k: f"{expected[k]}" for k in expected.keys() - both},
        "unexpected": {k: f"{found[k]}" for k in found.keys() - both},
        "misshaped": {k: f"{found[k]} for {expected[k]}" for k in both if expected[k] != found[k]},
    }
    lines = [
        f"{kind}: {', '.join(f'{key} {shape}' for key, shape in sorted(keys.items()))}"
        for kind, keys in problems.items()
        if keys
    ]
    if lines:
        raise UserError(
            f"{where}: {sum(map(len, problems.values()))} keys do not match: {'; '.join(lines)}"
        )
