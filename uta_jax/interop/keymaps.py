"""State-dict layouts of other libraries: one table per format, read in both directions.

A row pairs one tensor of theirs with one or several of our parameters. Several are stacked along
the first axis of theirs, which is how a fused qkv or w12 matrix is split and put together again.
``{i}`` in their name is the block index, where our parameter has a leading depth axis. What a
format cannot say in rows (activations, epsilons, rotary positions) stands in its ``vision`` and
``text`` tables.

A new format is one more entry of ``FORMATS``; ``translate.py`` does the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

import numpy as np

from uta_jax.models.presets import ClipSpec
from uta_jax.models.vit import rope_table


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
    """``theirs`` <-> ``ours``, by the rule of that name applied to each of ours.

    ``optional``: their model of an architecture without these parameters has no such tensor.
    """

    theirs: str
    ours: str | tuple[str, ...]
    rule: str = "same"
    optional: bool = False

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
            act=("gelu", "quick_gelu"), pool=("cls",), rope_theta=(0.0,)
        ),
        text=dict(act=("gelu", "quick_gelu"), causal=(True,), pool=("end",)),
    ),
    # jihaonew/UTA, eva_vit_model/{eva_vit,transformer}.py. The state dict names no activation and
    # no epsilon: another architecture would load in their code, and give other features.
    "uta": Format(
        "released UTA",
        (Row("logit_scale", "logit_scale"), *_EVA02_VISION, *_OPEN_CLIP_TEXT),
        (*_rope_buffers("visual.rope"), *_rope_buffers(f"{_EVA02_ATTN}.rope")),
        vision=dict(
            act=("swiglu",), ln_eps=(1e-6,), pool=("cls",), rope_theta=(10000.0,), rope_grid=(16,)
        ),
        text=dict(act=("gelu",), ln_eps=(1e-5,), causal=(True,), pool=("end",)),
    ),
    # Our own directory: every path is its own name.
    "uta_jax": Format("uta-jax", ()),
}  # fmt: skip
