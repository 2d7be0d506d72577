"""Layouts of timm's vision transformers: alone, and as the ``visual.trunk.`` of open_clip."""

from uta_jax.interop.keymaps.rows import Format, Row, affine, heads, norm
from uta_jax.models.presets import ClipSpec


def _stem(prefix: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}cls_token", f"{ours}/cls_token", "squeeze2", optional=True),
        Row(f"{prefix}pos_embed", f"{ours}/pos_embed", "squeeze"),
        Row(f"{prefix}patch_embed.proj.weight", f"{ours}/patch_embed/kernel", "conv"),
        Row(f"{prefix}patch_embed.proj.bias", f"{ours}/patch_embed/bias", optional=True),
        *norm(f"{prefix}norm_pre", f"{ours}/embed_norm", optional=True),
    )


def _head(prefix: str, ours: str) -> tuple[Row, ...]:
    return (
        *norm(f"{prefix}norm", f"{ours}/head/norm"),
        *affine(f"{prefix}head", f"{ours}/head/proj", optional=True),  # num_classes=0: none
    )


def _mlp(theirs: str, ours: str, up: tuple[str, ...] = ("up",)) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}.fc1.weight", tuple(f"{ours}/{x}/kernel" for x in up), "linear"),
        Row(f"{theirs}.fc1.bias", tuple(f"{ours}/{x}/bias" for x in up)),
        *norm(f"{theirs}.norm", f"{ours}/norm", optional=True),
        *affine(f"{theirs}.fc2", f"{ours}/down"),
    )


def _block(theirs: str, ours: str, scale: str, attn: tuple, mlp: tuple) -> tuple[Row, ...]:
    """``scale``: how the layer scales are called, with their number left open."""
    return (
        *norm(f"{theirs}.norm1", f"{ours}/norm1"),
        *attn,
        *norm(f"{theirs}.attn.norm", f"{ours}/attn/norm", optional=True),
        *affine(f"{theirs}.attn.proj", f"{ours}/attn/proj", "from_heads"),
        Row(f"{theirs}.{scale.format(1)}", f"{ours}/layer_scale1", optional=True),
        *norm(f"{theirs}.norm2", f"{ours}/norm2"),
        *mlp,
        Row(f"{theirs}.{scale.format(2)}", f"{ours}/layer_scale2", optional=True),
    )


def _map_pool(theirs: str, ours: str) -> tuple[Row, ...]:
    """timm/layers/attention_pool.py: AttentionPoolLatent, where the model pools by it."""
    rows = (
        Row(f"{theirs}.latent", f"{ours}/probe", "squeeze2"),
        *heads(f"{theirs}.q.", f"{ours}/attn", "q"),
        *heads(f"{theirs}.kv.", f"{ours}/attn", "kv"),
        *affine(f"{theirs}.proj", f"{ours}/attn/proj", "from_heads"),
        *norm(f"{theirs}.norm", f"{ours}/norm"),
        *_mlp(f"{theirs}.mlp", f"{ours}/mlp"),
    )
    return tuple(row._replace(optional=True) for row in rows)


def vit_rows(
    prefix: str = "", ours: str = "vision", up: tuple[str, ...] = ("up",)
) -> tuple[Row, ...]:
    """timm/models/vision_transformer.py; ``up``: ("gate", "up") where SwiGLU is packed in one."""
    block, ours_block = f"{prefix}blocks.{{i}}", f"{ours}/blocks"
    attn = heads(f"{block}.attn.qkv.", f"{ours_block}/attn")
    mlp = _mlp(f"{block}.mlp", f"{ours_block}/mlp", up)
    return (
        *_stem(prefix, ours),
        *_block(block, ours_block, "ls{}.gamma", attn, mlp),
        *_head(prefix, ours),
        *_map_pool(f"{prefix}attn_pool", f"{ours}/pool"),
    )


def eva01_rows(prefix: str = "", ours: str = "vision") -> tuple[Row, ...]:
    """timm/models/eva.py with ``qkv_fused``: q and v have a bias, the map is one, GELU."""
    block, ours_block = f"{prefix}blocks.{{i}}", f"{ours}/blocks"
    attn = (
        heads(f"{block}.attn.qkv.", f"{ours_block}/attn")[0],
        Row(f"{block}.attn.q_bias", f"{ours_block}/attn/q/bias", "head_bias"),
        Row(f"{block}.attn.v_bias", f"{ours_block}/attn/v/bias", "head_bias"),
    )
    mlp = _mlp(f"{block}.mlp", f"{ours_block}/mlp")
    return (
        *_stem(prefix, ours),
        *_block(block, ours_block, "gamma_{}", attn, mlp),
        *_head(prefix, ours),
    )


def eva02_rows(prefix: str = "", ours: str = "vision") -> tuple[Row, ...]:
    """timm/models/eva.py without ``qkv_fused``: three maps, k without bias, SwiGLU with a norm."""
    block, ours_block = f"{prefix}blocks.{{i}}", f"{ours}/blocks"
    attn = (
        *heads(f"{block}.attn.q_proj.", f"{ours_block}/attn", "q"),
        Row(f"{block}.attn.k_proj.weight", f"{ours_block}/attn/k/kernel", "to_heads"),
        *heads(f"{block}.attn.v_proj.", f"{ours_block}/attn", "v"),
    )
    mlp = (
        *affine(f"{block}.mlp.fc1_g", f"{ours_block}/mlp/gate"),
        *affine(f"{block}.mlp.fc1_x", f"{ours_block}/mlp/up"),
        *norm(f"{block}.mlp.norm", f"{ours_block}/mlp/norm"),
        *affine(f"{block}.mlp.fc2", f"{ours_block}/mlp/down"),
    )
    return (
        *_stem(prefix, ours),
        *_block(block, ours_block, "gamma_{}", attn, mlp),
        *_head(prefix, ours),
    )


def reasons(spec: ClipSpec) -> list[str]:
    """Which parameters timm ties together, and this architecture does not."""
    vision, found = spec.vision, []
    if vision.patch_bias == vision.embed_norm:
        found.append("its patch embedding has a bias exactly where no norm follows it")
    if vision.head_bias != vision.head_proj:
        found.append("its head has a bias exactly where there is a head")
    if vision.cls != (vision.pool == "cls"):
        found.append("it has a class token exactly where it pools by it")
    return found


# What the names of the tensors do not tell. Rotary positions are arguments of its EVA models.
VIT = dict(act=("gelu", "gelu_tanh", "quick_gelu"), ln_eps=(1e-6, 1e-5), rope_theta=(0.0,))
EVA01 = dict(act=("gelu",), ln_eps=(1e-6,), pool=("cls",))
EVA02 = dict(act=("swiglu",), ln_eps=(1e-6,), pool=("cls",))

FORMATS: dict[str, Format] = {
    "timm_vit": Format("timm VisionTransformer", vit_rows(), vision=VIT, reasons=reasons),
    # DINOv2's giant
    "timm_vit_swiglu": Format(
        "timm VisionTransformer with SwiGLU",
        vit_rows(up=("gate", "up")),
        vision=VIT | dict(act=("swiglu",), pool=("cls",)),
        reasons=reasons,
    ),
    "timm_eva01": Format("timm Eva, fused qkv", eva01_rows(), vision=EVA01, reasons=reasons),
    "timm_eva02": Format("timm Eva, EVA-02", eva02_rows(), vision=EVA02, reasons=reasons),
}
