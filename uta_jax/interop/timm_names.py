"""The architectures of timm that are ours, by name."""

from dataclasses import replace

from uta_jax.models.presets import CLIP, VIT, VitSpec

# Names of timm -> what they make without arguments, but for the head. ``pool="avg"`` is not ours:
# there ``global_pool`` has to be given.
_PLAIN = {  # image, patch, width, depth, heads
    "vit_tiny_patch16_224": (224, 16, 192, 12, 3),
    "vit_small_patch32_224": (224, 32, 384, 12, 6),
    "vit_small_patch16_224": (224, 16, 384, 12, 6),
    "vit_base_patch32_224": (224, 32, 768, 12, 12),
    "vit_base_patch16_224": (224, 16, 768, 12, 12),
    "vit_base_patch16_384": (384, 16, 768, 12, 12),
    "vit_large_patch16_224": (224, 16, 1024, 24, 16),
    "vit_large_patch16_384": (384, 16, 1024, 24, 16),
    "vit_large_patch14_224": (224, 14, 1024, 24, 16),
    "vit_huge_patch14_224": (224, 14, 1280, 32, 16),
}
_SIGLIP = {  # image, patch, width, depth, heads, hidden, activation
    "vit_base_patch32_siglip_256": (256, 32, 768, 12, 12, 3072, "gelu_tanh"),
    "vit_base_patch16_siglip_224": (224, 16, 768, 12, 12, 3072, "gelu"),
    "vit_base_patch16_siglip_256": (256, 16, 768, 12, 12, 3072, "gelu"),
    "vit_base_patch16_siglip_384": (384, 16, 768, 12, 12, 3072, "gelu"),
    "vit_base_patch16_siglip_512": (512, 16, 768, 12, 12, 3072, "gelu"),
    "vit_large_patch16_siglip_256": (256, 16, 1024, 24, 16, 4096, "gelu"),
    "vit_large_patch16_siglip_384": (384, 16, 1024, 24, 16, 4096, "gelu"),
    "vit_large_patch16_siglip_512": (512, 16, 1024, 24, 16, 4096, "gelu_tanh"),
    "vit_so400m_patch14_siglip_224": (224, 14, 1152, 27, 16, 4304, "gelu"),
    "vit_so400m_patch14_siglip_378": (378, 14, 1152, 27, 16, 4304, "gelu"),
    "vit_so400m_patch16_siglip_256": (256, 16, 1152, 27, 16, 4304, "gelu_tanh"),
    "vit_so400m_patch16_siglip_384": (384, 16, 1152, 27, 16, 4304, "gelu_tanh"),
    "vit_so400m_patch16_siglip_512": (512, 16, 1152, 27, 16, 4304, "gelu_tanh"),
}


def _headless(spec: VitSpec, **changes) -> VitSpec:
    return replace(
        spec, out_dim=changes.get("width", spec.width), head_proj=False, head_bias=False, **changes
    )


def _siglip(image_size, patch_size, width, depth, heads, mlp_hidden, act) -> VitSpec:
    return _headless(
        CLIP["siglip_b16"].vision, image_size=image_size, patch_size=patch_size, width=width,
        depth=depth, heads=heads, mlp_hidden=mlp_hidden, act=act,
    )  # fmt: skip


def _plain(image_size, patch_size, width, depth, heads) -> VitSpec:
    return VitSpec(
        image_size, patch_size, width, depth, heads, 4 * width, width, head_proj=False
    )  # fmt: skip


def _clip(name: str, act: str = "gelu") -> VitSpec:
    return _headless(CLIP[name].vision, act=act)


_CLIP_H = dict(width=1280, depth=32, heads=16, mlp_hidden=5120)
_EVA01 = _headless(CLIP["eva01_g14"].vision)
_EVA02_B14 = _headless(VIT["uta_b16"], patch_size=14, pool="avg")
_EVA02_L14 = _headless(VIT["uta_l14"], pool="avg")

ARCHITECTURES: dict[str, tuple[str, VitSpec]] = {
    **{name: ("timm_vit", _plain(*sizes)) for name, sizes in _PLAIN.items()},
    **{name: ("timm_vit", _siglip(*sizes)) for name, sizes in _SIGLIP.items()},
    "vit_base_patch32_clip_224": ("timm_vit", _clip("clip_b32")),
    "vit_base_patch16_clip_224": ("timm_vit", _clip("clip_b16")),
    "vit_large_patch14_clip_224": ("timm_vit", _clip("clip_l14")),
    "vit_large_patch14_clip_336": ("timm_vit", _clip("clip_l14_336")),
    "vit_huge_patch14_clip_224": ("timm_vit", replace(_clip("clip_l14"), out_dim=1280, **_CLIP_H)),
    "vit_base_patch32_clip_quickgelu_224": ("timm_vit", _clip("clip_b32", "quick_gelu")),
    "vit_base_patch16_clip_quickgelu_224": ("timm_vit", _clip("clip_b16", "quick_gelu")),
    "vit_large_patch14_clip_quickgelu_224": ("timm_vit", _clip("clip_l14", "quick_gelu")),
    "vit_large_patch14_clip_quickgelu_336": ("timm_vit", _clip("clip_l14_336", "quick_gelu")),
    "vit_small_patch14_dinov2": ("timm_vit", VIT["dinov2_s14"]),
    "vit_base_patch14_dinov2": ("timm_vit", VIT["dinov2_b14"]),
    "vit_large_patch14_dinov2": ("timm_vit", VIT["dinov2_l14"]),
    "vit_giant_patch14_dinov2": ("timm_vit_swiglu", VIT["dinov2_g14"]),
    "eva_giant_patch14_clip_224": ("timm_eva01", _EVA01),
    "eva_giant_patch14_224": ("timm_eva01", replace(_EVA01, pool="avg")),
    "eva_giant_patch14_336": ("timm_eva01", replace(_EVA01, pool="avg", image_size=336)),
    "eva02_base_patch16_clip_224": ("timm_eva02", _headless(CLIP["eva02_b16"].vision)),
    "eva02_large_patch14_clip_224": ("timm_eva02", _headless(CLIP["eva02_l14"].vision)),
    "eva02_large_patch14_clip_336": ("timm_eva02", _headless(CLIP["eva02_l14_336"].vision)),
    "eva02_base_patch14_224": ("timm_eva02", _EVA02_B14),
    "eva02_base_patch14_448": ("timm_eva02", replace(_EVA02_B14, image_size=448)),
    "eva02_large_patch14_224": ("timm_eva02", _EVA02_L14),
    "eva02_large_patch14_448": ("timm_eva02", replace(_EVA02_L14, image_size=448)),
}
