"""Layouts that descend from open_clip: its own, EVA-CLIP's, released UTA's."""

import numpy as np

from uta_jax.interop.keymaps import timm
from uta_jax.interop.keymaps.rows import Extra, Format, Row, affine, heads, norm
from uta_jax.models.attention import rope_table
from uta_jax.models.presets import ClipSpec

_SCALE = (Row("logit_scale", "logit_scale"), Row("logit_bias", "logit_bias", optional=True))


# Towers of BAAI's EVA-CLIP (EVA-CLIP/rei/eva_clip/eva_vit_model.py), and of UTA after them

_EVA_BLOCK = "visual.blocks.{i}"
_EVA_ATTN = f"{_EVA_BLOCK}.attn"
_EVA_STEM = (
    Row("visual.cls_token", "vision/cls_token", "squeeze2"),
    Row("visual.pos_embed", "vision/pos_embed", "squeeze"),
    *affine("visual.patch_embed.proj", "vision/patch_embed", "conv"),
    *norm(f"{_EVA_BLOCK}.norm1", "vision/blocks/norm1"),
    Row(f"{_EVA_ATTN}.q_bias", "vision/blocks/attn/q/bias", "head_bias"),
    Row(f"{_EVA_ATTN}.v_bias", "vision/blocks/attn/v/bias", "head_bias"),
    *affine(f"{_EVA_ATTN}.proj", "vision/blocks/attn/proj", "from_heads"),
    *norm(f"{_EVA_BLOCK}.norm2", "vision/blocks/norm2"),
    *norm("visual.norm", "vision/head/norm"),
    *affine("visual.head", "vision/head/proj"),
)
_EVA01_VISION = (
    *_EVA_STEM,
    heads(f"{_EVA_ATTN}.qkv.", "vision/blocks/attn")[0],
    *affine(f"{_EVA_BLOCK}.mlp.fc1", "vision/blocks/mlp/up"),
    *affine(f"{_EVA_BLOCK}.mlp.fc2", "vision/blocks/mlp/down"),
)
_UTA_VISION = (
    *_EVA_STEM,
    Row(f"{_EVA_ATTN}.q_proj.weight", "vision/blocks/attn/q/kernel", "to_heads"),
    Row(f"{_EVA_ATTN}.k_proj.weight", "vision/blocks/attn/k/kernel", "to_heads"),
    Row(f"{_EVA_ATTN}.v_proj.weight", "vision/blocks/attn/v/kernel", "to_heads"),
    *affine(f"{_EVA_BLOCK}.mlp.w1", "vision/blocks/mlp/gate"),
    *affine(f"{_EVA_BLOCK}.mlp.w2", "vision/blocks/mlp/up"),
    *norm(f"{_EVA_BLOCK}.mlp.ffn_ln", "vision/blocks/mlp/norm"),
    *affine(f"{_EVA_BLOCK}.mlp.w3", "vision/blocks/mlp/down"),
)
_EVA02_VISION = (*_UTA_VISION, *norm(f"{_EVA_ATTN}.inner_attn_ln", "vision/blocks/attn/norm"))


# Towers of open_clip itself (open_clip/transformer.py)


def _resblocks(theirs: str, ours: str) -> tuple[Row, ...]:
    block = f"{theirs}transformer.resblocks.{{i}}"
    return (
        *norm(f"{block}.ln_1", f"{ours}/norm1"),
        *heads(f"{block}.attn.in_proj_", f"{ours}/attn"),
        *affine(f"{block}.attn.out_proj", f"{ours}/attn/proj", "from_heads"),
        *norm(f"{block}.ln_2", f"{ours}/norm2"),
        *affine(f"{block}.mlp.c_fc", f"{ours}/mlp/up"),
        *affine(f"{block}.mlp.c_proj", f"{ours}/mlp/down"),
    )


def _text(prefix: str, *projection: Row) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}positional_embedding", "text/pos_embed"),
        Row(f"{prefix}token_embedding.weight", "text/token_embed/embedding"),
        *_resblocks(prefix, "text/blocks"),
        *norm(f"{prefix}ln_final", "text/head/norm"),
        *(projection or [Row(f"{prefix}text_projection", "text/head/proj/kernel")]),  # x @ p
    )


_TEXT = _text("text.")
_SIGLIP_TEXT = _text("text.", *affine("text.text_projection", "text/head/proj"))
_VISION = (
    Row("visual.class_embedding", "vision/cls_token"),
    Row("visual.positional_embedding", "vision/pos_embed"),
    Row("visual.conv1.weight", "vision/patch_embed/kernel", "conv"),
    *norm("visual.ln_pre", "vision/embed_norm", optional=True),
    *_resblocks("visual.", "vision/blocks"),
    *norm("visual.ln_post", "vision/head/norm"),
    Row("visual.proj", "vision/head/proj/kernel"),  # x @ p: no transpose
)


def _rope_buffers(prefix: str) -> tuple[Extra, Extra]:
    """Their rotary tables [n, head_dim], which have no row for CLS."""
    return (
        Extra(f"{prefix}.freqs_cos", lambda spec: np.asarray(rope_table(spec.vision)[0][1:]), True),
        Extra(f"{prefix}.freqs_sin", lambda spec: np.asarray(rope_table(spec.vision)[1][1:]), True),
    )


_ROPE = (*_rope_buffers("visual.rope"), *_rope_buffers(f"{_EVA_ATTN}.rope"))


def _one_family(spec: ClipSpec) -> list[str]:
    """open_clip has one switch for QuickGELU, which both of its own towers obey."""
    if spec.text is None or (spec.vision.act == "quick_gelu") == (spec.text.act == "quick_gelu"):
        return []
    return [
        f"one of vision.act = {spec.vision.act!r} and text.act = {spec.text.act!r} is QuickGELU "
        "(it holds both or neither)"
    ]


# What the names of the tensors do not tell: another architecture would load in their code, and
# give other features. open_clip's own activations, epsilons and masks stand in its configuration.
_GELU = dict(act=("gelu", "gelu_tanh", "quick_gelu"))
_EVA_TEXT = dict(act=("gelu",), ln_eps=(1e-5,), causal=(True,), pool=("end",))
_EVA = dict(ln_eps=(1e-6,), pool=("cls",))
_EVA01 = _EVA | dict(act=("gelu",), rope_theta=(0.0,))
_EVA02 = _EVA | dict(act=("swiglu",), rope_theta=(10000.0,), rope_grid=(16,))

FORMATS: dict[str, Format] = {
    "open_clip": Format(
        "open_clip CLIP",
        (*_SCALE, *_VISION, *_text("")),
        vision=_GELU | dict(rope_theta=(0.0,)),
        text=_GELU,
        reasons=_one_family,
    ),
    "open_clip_text": Format(
        "open_clip CustomTextCLIP",
        (*_SCALE, *_VISION, *_TEXT),
        vision=_GELU | dict(rope_theta=(0.0,)),
        text=_GELU,
        reasons=_one_family,
    ),
    # open_clip with a tower of timm. Its text tower may be QuickGELU, whatever the other is.
    "open_clip_eva01": Format(
        "open_clip, EVA01-CLIP",
        (*_SCALE, *timm.eva01_rows("visual.trunk."), *_TEXT),
        vision=timm.EVA01,
        text=_GELU,
        reasons=timm.reasons,
    ),
    "open_clip_eva02": Format(
        "open_clip, EVA02-CLIP",
        (*_SCALE, *timm.eva02_rows("visual.trunk."), *_TEXT),
        vision=timm.EVA02,
        text=_GELU,
        reasons=timm.reasons,
    ),
    "open_clip_siglip": Format(
        "open_clip, SigLIP",
        (*_SCALE, *timm.vit_rows("visual.trunk."), *_SIGLIP_TEXT),
        vision=timm.VIT,
        text=_GELU,
        reasons=timm.reasons,
    ),
    "eva_clip01": Format(
        "BAAI EVA01-CLIP",
        (Row("logit_scale", "logit_scale"), *_EVA01_VISION, *_TEXT),
        vision=_EVA01,
        text=_EVA_TEXT,
    ),
    "eva_clip02": Format(
        "BAAI EVA02-CLIP",
        (Row("logit_scale", "logit_scale"), *_EVA02_VISION, *_TEXT),
        _ROPE,
        vision=_EVA02,
        text=_EVA_TEXT,
    ),
    # jihaonew/UTA, eva_vit_model/{eva_vit,transformer}.py
    "uta": Format(
        "released UTA",
        (Row("logit_scale", "logit_scale"), *_UTA_VISION, *_TEXT),
        _ROPE,
        vision=_EVA02,
        text=_EVA_TEXT,
    ),
}
