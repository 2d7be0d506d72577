"""State-dict layouts of other libraries: one table per format, read in both directions.

A row pairs one tensor of theirs with one or several of our parameters. Several are stacked along
the first axis of theirs, which is how a fused qkv or w12 matrix is split and put together again.
``{i}`` in their name is the block index, where our parameter has a leading depth axis.

A new format is one more entry of ``FORMATS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import jax
import numpy as np

from uta_jax import UserError
from uta_jax.mesh import path_name
from uta_jax.models.presets import ClipSpec
from uta_jax.models.text import init_text
from uta_jax.models.vit import init_vit, rope_table

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """A pair of inverse maps between one tensor of theirs and one of our parameters.

    ``load`` need only bring the values into our order: the shape follows from the specification.
    """

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _save_conv(x: np.ndarray) -> np.ndarray:
    side = isqrt(x.shape[0] // 3)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


RULES: dict[str, Rule] = {
    "same": Rule(_same, _same),
    # torch.nn.Linear weights are [out, in]; ours are [in, out], with the heads kept apart
    "linear": Rule(_transpose, _transpose),
    "to_heads": Rule(_transpose, lambda x: x.reshape(x.shape[0], -1).T),
    "from_heads": Rule(_transpose, lambda x: x.reshape(-1, x.shape[-1]).T),
    "head_bias": Rule(_same, lambda x: x.reshape(-1)),
    # convolution [d, 3, p, p] <-> [p * p * 3, d], flattened as (row, column, channel)
    "conv": Rule(lambda x: x.transpose(2, 3, 1, 0), _save_conv),
    # [1, n, d] <-> [n, d] and [1, 1, d] <-> [d]
    "squeeze": Rule(_same, lambda x: x[None]),
    "squeeze2": Rule(_same, lambda x: x[None, None]),
}


class Row(NamedTuple):
    """``theirs`` <-> ``ours``, by the rule of that name applied to each of ours."""

    theirs: str
    ours: str | tuple[str, ...]
    rule: str = "same"

    @property
    def paths(self) -> tuple[str, ...]:
        """Our paths, one or several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Extra(NamedTuple):
    """A key without a parameter: ignored when read, written by ``make(spec)`` where demanded."""

    theirs: str
    make: Callable[[ClipSpec], np.ndarray] | None = None


@dataclass(frozen=True)
class Format:
    """One layout: its rows, its keys without parameters, and the architectures that it can hold."""

    title: str
    rows: tuple[Row, ...]
    extras: tuple[Extra, ...] = ()
    vision: Mapping[str, tuple] = field(default_factory=dict)  # VitSpec field -> values it can hold
    text: Mapping[str, tuple] = field(default_factory=dict)  # TextSpec field -> values it can hold


def _affine(theirs: str, ours: str, rule: str = "linear", bias: str = "same") -> tuple[Row, Row]:
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", rule),
        Row(f"{theirs}.bias", f"{ours}/bias", bias),
    )


def _norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def _hf_blocks(tower: str, ours: str) -> tuple[Row, ...]:
    theirs, ours = f"{tower}.encoder.layers.{{i}}", f"{ours}/blocks"
    attn = f"{theirs}.self_attn"
    return (
        *_norm(f"{theirs}.layer_norm1", f"{ours}/norm1"),
        *_affine(f"{attn}.q_proj", f"{ours}/attn/q", "to_heads", "head_bias"),
        *_affine(f"{attn}.k_proj", f"{ours}/attn/k", "to_heads", "head_bias"),
        *_affine(f"{attn}.v_proj", f"{ours}/attn/v", "to_heads", "head_bias"),
        *_affine(f"{attn}.out_proj", f"{ours}/attn/proj", "from_heads"),
        *_norm(f"{theirs}.layer_norm2", f"{ours}/norm2"),
        *_affine(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *_affine(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
    )


_HF_CLIP = (
    Row("logit_scale", "logit_scale"),
    Row("vision_model.embeddings.class_embedding", "vision/cls_token"),
    Row("vision_model.embeddings.patch_embedding.weight", "vision/patch_embed/kernel", "conv"),
    Row("vision_model.embeddings.position_embedding.weight", "vision/pos_embed"),
    *_norm("vision_model.pre_layrnorm", "vision/embed_norm"),  # their spelling
    *_hf_blocks("vision_model", "vision"),
    *_norm("vision_model.post_layernorm", "vision/head/norm"),
    Row("visual_projection.weight", "vision/head/proj/kernel", "linear"),
    Row("text_model.embeddings.token_embedding.weight", "text/token_embed/embedding"),
    Row("text_model.embeddings.position_embedding.weight", "text/pos_embed"),
    *_hf_blocks("text_model", "text"),
    *_norm("text_model.final_layer_norm", "text/head/norm"),
    Row("text_projection.weight", "text/head/proj/kernel", "linear"),
)

_EVA02_BLOCK = "visual.blocks.{i}"
_EVA02_ATTN = f"{_EVA02_BLOCK}.attn"
_EVA02_VISION = (
    Row("visual.cls_token", "vision/cls_token", "squeeze2"),
    Row("visual.pos_embed", "vision/pos_embed", "squeeze"),
    *_affine("visual.patch_embed.proj", "vision/patch_embed", "conv"),
    *_norm(f"{_EVA02_BLOCK}.norm1", "vision/blocks/norm1"),
    Row(f"{_EVA02_ATTN}.q_proj.weight", "vision/blocks/attn/q/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.k_proj.weight", "vision/blocks/attn/k/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.v_proj.weight", "vision/blocks/attn/v/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.q_bias", "vision/blocks/attn/q/bias", "head_bias"),
    Row(f"{_EVA02_ATTN}.v_bias", "vision/blocks/attn/v/bias", "head_bias"),
    *_affine(f"{_EVA02_ATTN}.proj", "vision/blocks/attn/proj", "from_heads"),
    *_norm(f"{_EVA02_BLOCK}.norm2", "vision/blocks/norm2"),
    *_affine(f"{_EVA02_BLOCK}.mlp.w1", "vision/blocks/mlp/gate"),
    *_affine(f"{_EVA02_BLOCK}.mlp.w2", "vision/blocks/mlp/up"),
    *_norm(f"{_EVA02_BLOCK}.mlp.ffn_ln", "vision/blocks/mlp/norm"),
    *_affine(f"{_EVA02_BLOCK}.mlp.w3", "vision/blocks/mlp/down"),
    *_norm("visual.norm", "vision/head/norm"),
    *_affine("visual.head", "vision/head/proj"),
)

_TEXT_BLOCK = "text.transformer.resblocks.{i}"
_OPEN_CLIP_TEXT = (
    Row("text.positional_embedding", "text/pos_embed"),
    Row("text.text_projection", "text/head/proj/kernel"),  # applied as x @ p: no transpose
    Row("text.token_embedding.weight", "text/token_embed/embedding"),
    *_norm(f"{_TEXT_BLOCK}.ln_1", "text/blocks/norm1"),
    Row(
        f"{_TEXT_BLOCK}.attn.in_proj_weight",
        tuple(f"text/blocks/attn/{x}/kernel" for x in "qkv"),
        "to_heads",
    ),
    Row(
        f"{_TEXT_BLOCK}.attn.in_proj_bias",
        tuple(f"text/blocks/attn/{x}/bias" for x in "qkv"),
        "head_bias",
    ),
    *_affine(f"{_TEXT_BLOCK}.attn.out_proj", "text/blocks/attn/proj", "from_heads"),
    *_norm(f"{_TEXT_BLOCK}.ln_2", "text/blocks/norm2"),
    *_affine(f"{_TEXT_BLOCK}.mlp.c_fc", "text/blocks/mlp/up"),
    *_affine(f"{_TEXT_BLOCK}.mlp.c_proj", "text/blocks/mlp/down"),
    *_norm("text.ln_final", "text/head/norm"),
)


def _rope_buffers(prefix: str) -> tuple[Extra, Extra]:
    """Their rotary tables [n, head_dim], which have no row for CLS."""
    return (
        Extra(f"{prefix}.freqs_cos", lambda spec: np.asarray(rope_table(spec.vision)[0][1:])),
        Extra(f"{prefix}.freqs_sin", lambda spec: np.asarray(rope_table(spec.vision)[1][1:])),
    )


FORMATS: dict[str, Format] = {
    # transformers, models/clip/modeling_clip.py: CLIPModel
    "hf_clip": Format(
        "Hugging Face CLIPModel",
        _HF_CLIP,
        (
            Extra("vision_model.embeddings.position_ids"),
            Extra("text_model.embeddings.position_ids"),
        ),
        vision=dict(
            act=("gelu", "quick_gelu"), embed_norm=(True,), patch_bias=(False,), qkv_bias=("qkv",),
            mlp_norm=(False,), head_bias=(False,), rope_theta=(0.0,),
        ),
        text=dict(act=("gelu", "quick_gelu"), qkv_bias=("qkv",), mlp_norm=(False,)),
    ),
    # jihaonew/UTA, eva_vit_model/{eva_vit,transformer}.py. The state dict names no activation and
    # no epsilon: another architecture would load in their code, and give other features.
    "uta": Format(
        "released UTA",
        (Row("logit_scale", "logit_scale"), *_EVA02_VISION, *_OPEN_CLIP_TEXT),
        (*_rope_buffers("visual.rope"), *_rope_buffers(f"{_EVA02_ATTN}.rope")),
        vision=dict(
            act=("swiglu",), ln_eps=(1e-6,), embed_norm=(False,), patch_bias=(True,),
            qkv_bias=("qv",), mlp_norm=(True,), head_bias=(True,), rope_theta=(10000.0,),
            rope_grid=(16,),
        ),
        text=dict(act=("gelu",), ln_eps=(1e-5,), qkv_bias=("qkv",), mlp_norm=(False,)),
    ),
    # Our own directory: every path is its own name.
    "uta_jax": Format("uta-jax", ()),
}  # fmt: skip


def misfits(fmt: str, spec: ClipSpec) -> list[str]:
    """Why format ``fmt`` cannot hold ``spec``, one short reason each; empty where it can."""
    table = FORMATS[fmt]
    towers = (("vision", spec.vision, table.vision), ("text", spec.text, table.text))
    return [
        f"{tower}.{name} = {getattr(part, name)!r} (it holds {' or '.join(map(repr, allowed))})"
        for tower, part, held in towers
        for name, allowed in held.items()
        if getattr(part, name) not in allowed
    ]


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
    towers = jax.eval_shape(
        lambda key: {"vision": init_vit(spec.vision, key), "text": init_text(spec.text, key)},
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return {"logit_scale": (), **{path: leaf.shape for path, leaf in flatten(towers).items()}}


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
