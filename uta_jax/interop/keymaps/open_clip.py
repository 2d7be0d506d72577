"""Layouts that descend from open_clip: its own, EVA-CLIP's, released UTA's."""

import numpy as np

from uta_jax.interop.keymaps.rows import Extra, Format, Row, affine, norm
from uta_jax.models.vit import rope_table

_EVA02_BLOCK = "visual.blocks.{i}"
_EVA02_ATTN = f"{_EVA02_BLOCK}.attn"
_EVA02_VISION = (
    Row("visual.cls_token", "vision/cls_token", "squeeze2"),
    Row("visual.pos_embed", "vision/pos_embed", "squeeze"),
    *affine("visual.patch_embed.proj", "vision/patch_embed", "conv"),
    *norm(f"{_EVA02_BLOCK}.norm1", "vision/blocks/norm1"),
    Row(f"{_EVA02_ATTN}.q_proj.weight", "vision/blocks/attn/q/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.k_proj.weight", "vision/blocks/attn/k/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.v_proj.weight", "vision/blocks/attn/v/kernel", "to_heads"),
    Row(f"{_EVA02_ATTN}.q_bias", "vision/blocks/attn/q/bias", "head_bias"),
    Row(f"{_EVA02_ATTN}.v_bias", "vision/blocks/attn/v/bias", "head_bias"),
    *affine(f"{_EVA02_ATTN}.proj", "vision/blocks/attn/proj", "from_heads"),
    *norm(f"{_EVA02_BLOCK}.norm2", "vision/blocks/norm2"),
    *affine(f"{_EVA02_BLOCK}.mlp.w1", "vision/blocks/mlp/gate"),
    *affine(f"{_EVA02_BLOCK}.mlp.w2", "vision/blocks/mlp/up"),
    *norm(f"{_EVA02_BLOCK}.mlp.ffn_ln", "vision/blocks/mlp/norm"),
    *affine(f"{_EVA02_BLOCK}.mlp.w3", "vision/blocks/mlp/down"),
    *norm("visual.norm", "vision/head/norm"),
    *affine("visual.head", "vision/head/proj"),
)

_TEXT_BLOCK = "text.transformer.resblocks.{i}"
_OPEN_CLIP_TEXT = (
    Row("text.positional_embedding", "text/pos_embed"),
    Row("text.text_projection", "text/head/proj/kernel"),  # applied as x @ p: no transpose
    Row("text.token_embedding.weight", "text/token_embed/embedding"),
    *norm(f"{_TEXT_BLOCK}.ln_1", "text/blocks/norm1"),
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
    *affine(f"{_TEXT_BLOCK}.attn.out_proj", "text/blocks/attn/proj", "from_heads"),
    *norm(f"{_TEXT_BLOCK}.ln_2", "text/blocks/norm2"),
    *affine(f"{_TEXT_BLOCK}.mlp.c_fc", "text/blocks/mlp/up"),
    *affine(f"{_TEXT_BLOCK}.mlp.c_proj", "text/blocks/mlp/down"),
    *norm("text.ln_final", "text/head/norm"),
)


def _rope_buffers(prefix: str) -> tuple[Extra, Extra]:
    """Their rotary tables [n, head_dim], which have no row for CLS."""
    return (
        Extra(f"{prefix}.freqs_cos", lambda spec: np.asarray(rope_table(spec.vision)[0][1:])),
        Extra(f"{prefix}.freqs_sin", lambda spec: np.asarray(rope_table(spec.vision)[1][1:])),
    )


FORMATS: dict[str, Format] = {
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
}  # fmt: skip
