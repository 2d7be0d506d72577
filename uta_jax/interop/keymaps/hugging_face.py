"""Layouts of transformers: the names in its files, which differ from its modules' for DINOv2."""

import numpy as np

from uta_jax.interop.keymaps.rows import Extra, Format, Row, affine, heads, norm
from uta_jax.models.presets import ClipSpec, VitSpec


def _attention(theirs: str, ours: str, names: tuple[str, str, str], optional: bool = False):
    """Rows of three separate maps, called ``names`` by them."""
    return tuple(
        row._replace(optional=optional and row.theirs.endswith("bias"))
        for name, x in zip(names, "qkv", strict=True)
        for row in affine(f"{theirs}.{name}", f"{ours}/{x}", "to_heads", "head_bias")
    )


def _mlp(theirs: str, ours: str) -> tuple[Row, ...]:
    return *affine(f"{theirs}.fc1", f"{ours}/up"), *affine(f"{theirs}.fc2", f"{ours}/down")


def _blocks(tower: str, ours: str) -> tuple[Row, ...]:
    theirs, ours = f"{tower}.encoder.layers.{{i}}", f"{ours}/blocks"
    return (
        *norm(f"{theirs}.layer_norm1", f"{ours}/norm1"),
        *_attention(f"{theirs}.self_attn", f"{ours}/attn", ("q_proj", "k_proj", "v_proj")),
        *affine(f"{theirs}.self_attn.out_proj", f"{ours}/attn/proj", "from_heads"),
        *norm(f"{theirs}.layer_norm2", f"{ours}/norm2"),
        *_mlp(f"{theirs}.mlp", f"{ours}/mlp"),
    )


_TEXT = (
    Row("text_model.embeddings.token_embedding.weight", "text/token_embed/embedding"),
    Row("text_model.embeddings.position_embedding.weight", "text/pos_embed"),
    *_blocks("text_model", "text"),
    *norm("text_model.final_layer_norm", "text/head/norm"),
)

_HF_CLIP = (
    Row("logit_scale", "logit_scale"),
    Row("vision_model.embeddings.class_embedding", "vision/cls_token"),
    Row("vision_model.embeddings.patch_embedding.weight", "vision/patch_embed/kernel", "conv"),
    Row("vision_model.embeddings.position_embedding.weight", "vision/pos_embed"),
    *norm("vision_model.pre_layrnorm", "vision/embed_norm"),  # their spelling
    *_blocks("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision/head/norm"),
    Row("visual_projection.weight", "vision/head/proj/kernel", "linear"),
    *_TEXT,
    Row("text_projection.weight", "text/head/proj/kernel", "linear"),
)

_POOL = "vision_model.head"
_HF_SIGLIP = (
    Row("logit_scale", "logit_scale", "squeeze"),
    Row("logit_bias", "logit_bias", "squeeze"),
    *affine("vision_model.embeddings.patch_embedding", "vision/patch_embed", "conv"),
    Row("vision_model.embeddings.position_embedding.weight", "vision/pos_embed"),
    *_blocks("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision/head/norm"),
    Row(f"{_POOL}.probe", "vision/pool/probe", "squeeze2"),
    *heads(f"{_POOL}.attention.in_proj_", "vision/pool/attn"),
    *affine(f"{_POOL}.attention.out_proj", "vision/pool/attn/proj", "from_heads"),
    *norm(f"{_POOL}.layernorm", "vision/pool/norm"),
    *_mlp(f"{_POOL}.mlp", "vision/pool/mlp"),
    *_TEXT,
    *affine("text_model.head", "text/head/proj"),
)

_DINO = "encoder.layer.{i}"
_DINO_OURS = "vision/blocks"
_DINO_MLP = _mlp(f"{_DINO}.mlp", f"{_DINO_OURS}/mlp")
_DINO_SWIGLU = (
    *(
        Row(
            f"{_DINO}.mlp.weights_in.{theirs}",
            (f"{_DINO_OURS}/mlp/gate/{ours}", f"{_DINO_OURS}/mlp/up/{ours}"),
            rule,
        )
        for theirs, ours, rule in (("weight", "kernel", "linear"), ("bias", "bias", "same"))
    ),
    *affine(f"{_DINO}.mlp.weights_out", f"{_DINO_OURS}/mlp/down"),
)


def _hf_dinov2(mlp: tuple[Row, ...]) -> tuple[Row, ...]:
    return (
        Row("embeddings.cls_token", "vision/cls_token", "squeeze2"),
        Row("embeddings.position_embeddings", "vision/pos_embed", "squeeze"),
        *affine("embeddings.patch_embeddings.projection", "vision/patch_embed", "conv"),
        *norm(f"{_DINO}.norm1", f"{_DINO_OURS}/norm1"),
        *_attention(
            f"{_DINO}.attention.attention",
            f"{_DINO_OURS}/attn",
            ("query", "key", "value"),
            optional=True,
        ),
        *affine(f"{_DINO}.attention.output.dense", f"{_DINO_OURS}/attn/proj", "from_heads"),
        Row(f"{_DINO}.layer_scale1.lambda1", f"{_DINO_OURS}/layer_scale1"),
        *norm(f"{_DINO}.norm2", f"{_DINO_OURS}/norm2"),
        *mlp,
        Row(f"{_DINO}.layer_scale2.lambda1", f"{_DINO_OURS}/layer_scale2"),
        *norm("layernorm", "vision/head/norm"),
    )


def dinov2_hidden(width: int, ratio: float, swiglu: bool) -> int:
    """Their hidden layer; beside a gate two thirds of it, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def dinov2_ratio(vision: VitSpec) -> int | None:
    """The mlp_ratio, which they declare a whole number, that gives this hidden layer."""
    swiglu = vision.act == "swiglu"
    sizes = {dinov2_hidden(vision.width, ratio, swiglu): ratio for ratio in range(1, 17)}
    return sizes.get(vision.mlp_hidden)


def dinov2_reasons(spec: ClipSpec) -> list[str]:
    """Why Dinov2Model cannot be made as ``spec`` says."""
    vision = spec.vision
    if dinov2_ratio(vision) is not None:
        return []
    return [f"no whole mlp_ratio gives vision.mlp_hidden = {vision.mlp_hidden}"]


def _no_mask(spec: ClipSpec) -> np.ndarray:
    """What stands for masked patches in DINOv2's own pre-training: no model sees it again."""
    return np.zeros((1, spec.vision.width))


_POSITION_IDS = tuple(
    Extra(f"{tower}.embeddings.position_ids") for tower in ("vision_model", "text_model")
)
_DINO_EXTRAS = (Extra("embeddings.mask_token", _no_mask),)
_ACTS = ("gelu", "gelu_tanh", "quick_gelu")
_DINO_HOLDS = dict(pool=("cls",), rope_theta=(0.0,), qkv_bias=("qkv", ""))

FORMATS: dict[str, Format] = {
    # transformers, models/clip/modeling_clip.py: CLIPModel
    "hf_clip": Format(
        "Hugging Face CLIPModel",
        _HF_CLIP,
        _POSITION_IDS,
        vision=dict(act=_ACTS, pool=("cls",), rope_theta=(0.0,)),
        text=dict(act=_ACTS, causal=(True,), pool=("end",)),
    ),
    # models/siglip/modeling_siglip.py: SiglipModel; SigLIP 2 of a fixed resolution is one, too
    "hf_siglip": Format(
        "Hugging Face SiglipModel",
        _HF_SIGLIP,
        _POSITION_IDS,
        vision=dict(act=_ACTS, pool=("map",), rope_theta=(0.0,)),
        text=dict(act=_ACTS, causal=(False,), pool=("last",)),
    ),
    # models/dinov2/modeling_dinov2.py: Dinov2Model, with the one MLP or the other
    "hf_dinov2": Format(
        "Hugging Face Dinov2Model",
        _hf_dinov2(_DINO_MLP),
        _DINO_EXTRAS,
        vision=dict(act=_ACTS, **_DINO_HOLDS),
        reasons=dinov2_reasons,
    ),
    "hf_dinov2_swiglu": Format(
        "Hugging Face Dinov2Model with SwiGLU (the giant)",
        _hf_dinov2(_DINO_SWIGLU),
        _DINO_EXTRAS,
        vision=dict(act=("swiglu",), **_DINO_HOLDS),
        reasons=dinov2_reasons,
    ),
}
