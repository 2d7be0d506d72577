"""Weights from a layout of ``keymaps.FORMATS`` to our parameters and back: strict both ways."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod
from typing import Any

import jax
import numpy as np

from uta_jax import UserError
from uta_jax.interop.files import Tensor, read_into
from uta_jax.interop.keymaps import FORMATS, RULES, Extra, Row
from uta_jax.mesh import path_name
from uta_jax.models.presets import ClipSpec
from uta_jax.models.text import init_text
from uta_jax.models.vit import init_vit

Shape = tuple[int, ...]
_BLOCK = re.compile(r"\.(\d+)\.")  # the number of a block in a name
THREADS = min(4, os.cpu_count() or 1)  # that read and rearrange; memory is busy with few


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
    reasons += table.reasons(spec)
    if not table.rows:
        return reasons
    ours = param_shapes(spec).keys()
    held = {path for row in table.rows for path in row.paths}
    needed = {path for row in table.rows if not row.optional for path in row.paths}
    reasons += [f"it has no place for {path}" for path in sorted(ours - held)]
    return reasons + [f"it needs {path}" for path in sorted(needed - ours)]


def to_ours(fmt: str, spec: ClipSpec, tensors: Mapping[str, Tensor]) -> dict:
    """Their named tensors -> our nested tree of float32 numpy arrays, whatever dtype they have.

    Numbers are read straight to where they stay, in the order of the file: where ours is another
    one the array is a view of them, transposed, and its users make of it what they need. Beside
    the result nothing is in memory.

    Raises UserError listing all missing, unexpected and misshaped keys, or all that are not finite.
    """
    check_tensors(fmt, spec, tensors)
    check_tables(fmt, spec, tensors)
    rules = {path: row.rule for _, row, _ in names(fmt, spec) for path in row.paths}
    shapes, stacked = param_shapes(spec), _stacked(fmt, spec)
    memory = {
        path: np.empty((shapes[path][0] if path in stacked else 1, *shape), np.float32)
        for path, shape in _part_shapes(fmt, spec).items()
    }

    def read(name: str, row: Row, block: int | None) -> bool:
        slots = [memory[path][block or 0, ...].reshape(-1) for path in row.paths]
        return all([read_into(x, tensors[name], i * x.size) for i, x in enumerate(slots)])

    _for_each(fmt, spec, tensors, read)
    flat = {
        path: _view(rules[path], memory.pop(path), shapes[path], path in stacked)
        for path in list(memory)
    }
    return unflatten(flat)


def stream_ours(
    fmt: str,
    spec: ClipSpec,
    tensors: Mapping[str, Tensor],
    put: Callable[[str, int, np.ndarray], None],
) -> None:
    """As ``to_ours``, but one piece at a time is in memory, and handed over.

    ``put(path, start, values)``: ``values`` (float32, C-contiguous) are those elements of the
    parameter ``path`` that follow ``start``. It is called from several threads. ``tensors`` are
    those that passed ``check_tensors``.
    """
    shapes, parts = param_shapes(spec), _part_shapes(fmt, spec)

    def hand_over(name: str, row: Row, block: int | None) -> bool:
        finite = True
        for i, path in enumerate(row.paths):
            part = np.empty(parts[path], np.float32)
            finite &= read_into(part.reshape(-1), tensors[name], i * part.size)
            values = _contiguous(RULES[row.rule].load(part))
            shape = shapes[path] if block is None else shapes[path][1:]
            put(path, (block or 0) * part.size, values.reshape(shape))
        return finite

    _for_each(fmt, spec, tensors, hand_over)


def check_tensors(fmt: str, spec: ClipSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where ``spec`` does not fit ``fmt``, or ``tensors`` are not those of both."""
    _check_fits(fmt, spec)
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    for name in dropped(fmt, spec, tensors):
        del found[name]
    _check_keys(their_shapes(fmt, spec), found, f"format {fmt!r}")


def check_tables(fmt: str, spec: ClipSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where a table that is dropped, for we make our own, holds another one."""
    tables = {x: np.asarray(x.make(spec)) for x in FORMATS[fmt].extras if x.fixed}
    for name, extra in _extra_names(fmt, spec):
        if extra not in tables or name not in tensors:
            continue
        found, ours = np.asarray(tensors[name]), tables[extra]
        allowed = 1e-4 if found.dtype.itemsize > 2 else 1e-2  # half precision is rounded
        if found.shape != ours.shape or not np.allclose(
            found.astype(np.float32), ours, rtol=0, atol=allowed
        ):
            vision = spec.vision
            raise UserError(
                f"{name} {found.shape} is another table of rotary positions than that of "
                f"rope_theta {vision.rope_theta:g}, rope_grid {vision.rope_grid} for a grid of "
                f"{vision.grid} x {vision.grid} patches: the features would be wrong"
            )


def dropped(fmt: str, spec: ClipSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names among ``tensors`` that hold no parameter."""
    extras = {name for name, _ in _extra_names(fmt, spec)}
    return [name for name in tensors if name in extras]


def _for_each(
    fmt: str,
    spec: ClipSpec,
    tensors: Mapping[str, Tensor],
    do: Callable[[str, Row, int | None], bool],
) -> None:
    """``do`` each row of each block on some threads; UserError for those that are not finite."""
    jobs = sorted(names(fmt, spec), key=lambda x: -prod(tensors[x[0]].shape))
    with ThreadPoolExecutor(THREADS) as pool:  # the largest first: no thread waits long at the end
        finite = list(pool.map(lambda x: do(*x), jobs))
    _check_finite([name for (name, _, _), fine in zip(jobs, finite, strict=True) if not fine])


def _view(rule: str, memory: np.ndarray, shape: Shape, stacked: bool) -> np.ndarray:
    """``memory`` [blocks, *theirs] as our parameter, without a copy where its order allows."""
    ours = RULES[rule].load(memory[0, ...]).reshape(shape[1:] if stacked else shape)
    if not stacked:
        return ours
    if np.may_share_memory(ours, memory):
        strides = (memory.strides[0], *ours.strides)
        return np.lib.stride_tricks.as_strided(ours, shape, strides)
    return np.stack([RULES[rule].load(x).reshape(shape[1:]) for x in memory])


def _contiguous(values: np.ndarray) -> np.ndarray:
    if values.flags.c_contiguous:
        return values
    out = np.empty(values.shape, np.float32)
    _copy(out, values)
    return out


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
    for name, row, block in names(fmt, spec):
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
    for i in range(0, values.shape[1], 128):
        slot[:, i : i + 128] = values[:, i : i + 128]


def names(fmt: str, spec: ClipSpec) -> Iterator[tuple[str, Row, int | None]]:
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
    parts, theirs = _part_shapes(fmt, spec), {}
    for name, row, _ in names(fmt, spec):
        first, *others = (parts[path] for path in row.paths)
        theirs[name] = (first[0] * (1 + len(others)), *first[1:]) if others else first
    return theirs


def _part_shapes(fmt: str, spec: ClipSpec) -> dict[str, Shape]:
    """Our path -> the shape of what one of their tensors holds of it, in their order."""
    shapes, parts = param_shapes(spec), {}
    for _, row, block in names(fmt, spec):
        for path in row.paths:
            if path not in parts:
                whole = shapes[path] if block is None else shapes[path][1:]
                ghost = np.broadcast_to(np.float32(0), whole)  # takes no memory
                parts[path] = RULES[row.rule].save(ghost).shape
    return parts


def _stacked(fmt: str, spec: ClipSpec) -> set[str]:
    return {path for _, row, block in names(fmt, spec) if block is not None for path in row.paths}


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
    lines = [f"{kind}: {', '.join(_grouped(keys))}" for kind, keys in problems.items() if keys]
    if lines:
        raise UserError(
            f"{where}: {sum(map(len, problems.values()))} keys do not match: {'; '.join(lines)}"
        )


def _grouped(keys: Mapping[str, str]) -> list[str]:
    """Each name with its note; of names that differ in the block alone, one with all numbers."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name, note in sorted(keys.items()):
        number = _BLOCK.search(name)
        pattern = _BLOCK.sub(".{}.", name, count=1) if number else name
        blocks.setdefault((pattern, note), []).extend([int(number[1])] if number else [])
    return [
        f"{pattern.replace('{}', _ranges(sorted(numbers)))} {note}"
        for (pattern, note), numbers in blocks.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}", [2] -> "2"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return told if len(numbers) < 2 else f"{{{told}}}"
