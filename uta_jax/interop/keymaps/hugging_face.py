"""Layouts of transformers (the names that ``save_pretrained`` writes)."""

from uta_jax.interop.keymaps.rows import Extra, Format, Row, affine, norm


def _blocks(tower: str, ours: str) -> tuple[Row, ...]:
    theirs, ours = f"{tower}.encoder.layers.{{i}}", f"{ours}/blocks"
    attn = f"{theirs}.self_attn"
    return (
        *norm(f"{theirs}.layer_norm1", f"{ours}/norm1"),
        *affine(f"{attn}.q_proj", f"{ours}/attn/q", "to_heads", "head_bias"),
        *affine(f"{attn}.k_proj", f"{ours}/attn/k", "to_heads", "head_bias"),
        *affine(f"{attn}.v_proj", f"{ours}/attn/v", "to_heads", "head_bias"),
        *affine(f"{attn}.out_proj", f"{ours}/attn/proj", "from_heads"),
        *norm(f"{theirs}.layer_norm2", f"{ours}/norm2"),
        *affine(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
        *affine(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
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
    Row("text_model.embeddings.token_embedding.weight", "text/token_embed/embedding"),
    Row("text_model.embeddings.position_embedding.weight", "text/pos_embed"),
    *_blocks("text_model", "text"),
    *norm("text_model.final_layer_norm", "text/head/norm"),
    Row("text_projection.weight", "text/head/proj/kernel", "linear"),
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
}  # fmt: skip
