"""Named model specifications, as data.

A specification says everything about an architecture that its weights do not: which activation,
which LayerNorm epsilon, which biases exist, how positions enter. Two checkpoints with equal shapes
and unequal specifications are different models, so nothing here has a guess at the point of use.
"""

from dataclasses import dataclass, replace

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VitSpec:
    """A vision transformer whose every output token can be projected into a joint space."""

    image_size: int  # pixels, square
    patch_size: int  # pixels, square; divides image_size
    width: int
    depth: int
    heads: int  # divides width
    mlp_hidden: int
    out_dim: int  # width e of the joint embedding
    act: str = "gelu"  # gelu | quick_gelu | swiglu
    ln_eps: float = 1e-6
    embed_norm: bool = False  # LayerNorm between the embedding and the blocks (CLIP's pre_layrnorm)
    patch_bias: bool = True
    qkv_bias: str = "qkv"  # which of q, k, v carry a bias: EVA has "qv"
    mlp_norm: bool = False  # LayerNorm over the hidden layer (EVA-02's sub-LN)
    head_bias: bool = False
    rope_theta: float = 0.0  # 0: no rotary positions
    rope_grid: int = 16  # positions are scaled to this grid, so any resolution spans the same range

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patch tokens of a whole image, without CLS."""
        return self.grid**2


@dataclass(frozen=True)
class TextSpec:
    """A CLIP text transformer: causal, pooled at end-of-text, linear projection without bias."""

    context: int  # tokens, start and end included
    vocab: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    out_dim: int
    act: str = "gelu"  # gelu | quick_gelu
    ln_eps: float = 1e-5
    qkv_bias: str = "qkv"
    mlp_norm: bool = False


@dataclass(frozen=True)
class ClipSpec:
    """A pair of towers with the image statistics they were trained with."""

    vision: VitSpec
    text: TextSpec
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"


def _clip_vit(image_size, patch_size, width, depth, heads, out_dim, act="quick_gelu"):
    return VitSpec(
        image_size, patch_size, width, depth, heads, 4 * width, out_dim,
        act=act, ln_eps=1e-5, embed_norm=True, patch_bias=False,
    )  # fmt: skip


def _clip_text(width, heads, depth=12, out_dim=None, act="quick_gelu", context=77):
    return TextSpec(context, 49408, width, depth, heads, 4 * width, out_dim or width, act=act)


def _uta_vit(image_size, patch_size, width, depth, heads, mlp_hidden, out_dim=1024):
    return VitSpec(
        image_size, patch_size, width, depth, heads, mlp_hidden, out_dim,
        act="swiglu", qkv_bias="qv", mlp_norm=True, head_bias=True, rope_theta=10000.0,
    )  # fmt: skip


# Text tower of the released UTA models (jihaonew/UTA, eva_vit_model/transformer.py), of
# EVA01-CLIP-g-14-plus and of OpenCLIP ViT-H-14.
_TEXT_H = _clip_text(1024, 16, depth=24, act="gelu")
_EVA01_G = VitSpec(
    224, 14, 1408, 40, 16, 6144, 1024, act="gelu", qkv_bias="qv", head_bias=True
)  # fmt: skip
# The text tower is exact GELU, as UTA's own: a student of it fits the released layout, too.
_TINY_TEXT = TextSpec(32, 49408, 64, 4, 2, 256, 64, act="gelu")
_TINY_VIT = _clip_vit(64, 8, 128, 4, 4, 64)

CLIP: dict[str, ClipSpec] = {
    # OpenAI CLIP (Radford et al. 2021, table 20); openai/clip-vit-* on Hugging Face agree.
    "clip_b32": ClipSpec(_clip_vit(224, 32, 768, 12, 12, 512), _clip_text(512, 8)),
    "clip_b16": ClipSpec(_clip_vit(224, 16, 768, 12, 12, 512), _clip_text(512, 8)),
    "clip_l14": ClipSpec(_clip_vit(224, 14, 1024, 24, 16, 768), _clip_text(768, 12)),
    "clip_l14_336": ClipSpec(_clip_vit(336, 14, 1024, 24, 16, 768), _clip_text(768, 12)),
    # EVA-CLIP (baaivision/EVA, EVA-CLIP/rei/eva_clip/model_configs): no RoPE, no sub-LN.
    "eva01_g14": ClipSpec(_EVA01_G, _clip_text(768, 12, out_dim=1024, act="gelu")),
    "eva01_g14_plus": ClipSpec(_EVA01_G, _TEXT_H),
    # The emoji world of configs/emoji_clip.py.
    "tiny_clip": ClipSpec(_TINY_VIT, _TINY_TEXT),
}

VIT: dict[str, VitSpec] = {
    # Released students (jihaonew/UTA, eva_vit_model/eva_vit.py): hidden = int(width * mlp_ratio).
    "uta_b16": _uta_vit(224, 16, 768, 12, 12, 2048),
    "uta_l14_336": _uta_vit(336, 14, 1024, 24, 16, 2730),
    "uta_g14_336": _uta_vit(336, 14, 1408, 40, 16, 4096),
    # The same at the size of their pre-training recipes here.
    "uta_l14": _uta_vit(224, 14, 1024, 24, 16, 2730),
    "uta_g14": _uta_vit(224, 14, 1408, 40, 16, 4096),
    # Small ones for laptops and tests. uta_tiny has every trait of the released students.
    "uta_tiny": _uta_vit(64, 8, 128, 4, 4, 340, out_dim=64),
    **{name: clip.vision for name, clip in CLIP.items()},
}


def resized(spec: VitSpec, image_size: int) -> VitSpec:
    """The same architecture at another input size (its learned positions must be resampled)."""
    return replace(spec, image_size=image_size)
