"""Named model specifications, as data.

A specification says everything about an architecture that its weights do not: which activation,
which LayerNorm epsilon, which biases exist, how positions enter. Two checkpoints with equal shapes
and unequal specifications are different models, so nothing here has a guess at the point of use.
"""

from dataclasses import dataclass, replace

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    act: str = "gelu"  # gelu | gelu_tanh | quick_gelu | swiglu
    ln_eps: float = 1e-6
    cls: bool = True  # a class token before the patch tokens
    embed_norm: bool = False  # LayerNorm between the embedding and the blocks (CLIP's pre_layrnorm)
    patch_bias: bool = True
    qkv_bias: str = "qkv"  # which of q, k, v carry a bias: EVA has "qv"
    attn_norm: bool = False  # LayerNorm before attention's output map (EVA02-CLIP)
    mlp_norm: bool = False  # LayerNorm over the hidden layer (EVA-02's sub-LN)
    layer_scale: bool = False  # learned factors on both branches of a block (DINOv2)
    pool: str = "cls"  # cls: the class token is the image; map: attention pooling (SigLIP)
    head_proj: bool = True  # False: the normed tokens are the embedding, out_dim == width
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
    """A text transformer, pooled at one token and projected."""

    context: int  # tokens, start and end included
    vocab: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    out_dim: int
    act: str = "gelu"  # gelu | gelu_tanh | quick_gelu
    ln_eps: float = 1e-5
    causal: bool = True
    pool: str = "end"  # end: at end-of-text, the highest id; last: at the last position (SigLIP)
    head_bias: bool = False
    # What a block of either tower may have, and no text tower does.
    qkv_bias: str = "qkv"
    attn_norm: bool = False
    mlp_norm: bool = False
    layer_scale: bool = False


@dataclass(frozen=True)
class ClipSpec:
    """A pair of towers, and how images and texts were prepared for them."""

    vision: VitSpec
    text: TextSpec | None  # None: a vision tower alone (DINOv2)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"  # bicubic | bilinear
    resize: str = "shortest"  # shortest: short side, then centre crop; squash: both sides
    resize_size: int = 0  # pixels that `resize` makes before the crop; 0: the input size
    logit_bias: bool = False  # a learned bias beside the scale (SigLIP)
    tokenizer: str = "clip"  # clip: byte pairs inside the package; else a file beside the weights
    cleaning: str = ""  # of texts before such a file's tokenizer; empty: as the file suggests


def _clip_vit(image_size, patch_size, width, depth, heads, out_dim, act="quick_gelu"):
    return VitSpec(
        image_size, patch_size, width, depth, heads, 4 * width, out_dim,
        act=act, ln_eps=1e-5, embed_norm=True, patch_bias=False,
    )  # fmt: skip


def _clip_text(width, heads, depth=12, out_dim=None, act="quick_gelu", context=77):
    return TextSpec(context, 49408, width, depth, heads, 4 * width, out_dim or width, act=act)


def _gelu_clip(image_size, patch_size, width, depth, heads, out_dim, text_heads, text_depth=12):
    return ClipSpec(
        _clip_vit(image_size, patch_size, width, depth, heads, out_dim, act="gelu"),
        _clip_text(out_dim, text_heads, depth=text_depth, act="gelu"),
    )


def _eva02_vit(image_size, patch_size, width, depth, heads, mlp_hidden, out_dim):
    return replace(
        _uta_vit(image_size, patch_size, width, depth, heads, mlp_hidden, out_dim), attn_norm=True
    )


def _siglip(image_size, patch_size, width, depth, heads, mlp_hidden, vocab, context=64):
    towers = dict(width=width, depth=depth, heads=heads, mlp_hidden=mlp_hidden, out_dim=width)
    return ClipSpec(
        VitSpec(
            image_size, patch_size, **towers, act="gelu_tanh", cls=False, pool="map",
            head_proj=False,
        ),
        TextSpec(
            context, vocab, **towers, act="gelu_tanh", ln_eps=1e-6, causal=False, pool="last",
            head_bias=True,
        ),
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", logit_bias=True,
        tokenizer="tokenizer.json",
    )  # fmt: skip


def _exact(spec: ClipSpec, text_act: str) -> ClipSpec:
    vision = replace(spec.vision, act="gelu")
    return replace(spec, vision=vision, text=replace(spec.text, act=text_act))


def _dinov2(width, depth, heads, act="gelu", mlp_hidden=None):
    return VitSpec(
        518, 14, width, depth, heads, mlp_hidden or 4 * width, width,
        act=act, layer_scale=True, head_proj=False,
    )  # fmt: skip


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
    # Shapes do not tell them from the *_gelu ones.
    "clip_b32": ClipSpec(_clip_vit(224, 32, 768, 12, 12, 512), _clip_text(512, 8)),
    "clip_b16": ClipSpec(_clip_vit(224, 16, 768, 12, 12, 512), _clip_text(512, 8)),
    "clip_l14": ClipSpec(_clip_vit(224, 14, 1024, 24, 16, 768), _clip_text(768, 12)),
    "clip_l14_336": ClipSpec(_clip_vit(336, 14, 1024, 24, 16, 768), _clip_text(768, 12)),
    # OpenCLIP (open_clip/model_configs/ViT-{B-32,B-16,L-14,H-14}.json): laion/CLIP-*.
    "clip_b32_gelu": _gelu_clip(224, 32, 768, 12, 12, 512, 8),
    "clip_b16_gelu": _gelu_clip(224, 16, 768, 12, 12, 512, 8),
    "clip_l14_gelu": _gelu_clip(224, 14, 1024, 24, 16, 768, 12),
    "clip_h14_gelu": _gelu_clip(224, 14, 1280, 32, 16, 1024, 16, text_depth=24),
    # EVA-CLIP (baaivision/EVA, EVA-CLIP/rei/eva_clip/model_configs). EVA01: no RoPE, no sub-LN;
    # EVA02: rotary positions, SwiGLU, LayerNorm inside attention and MLP.
    "eva01_g14": ClipSpec(_EVA01_G, _clip_text(768, 12, out_dim=1024, act="gelu")),
    "eva01_g14_plus": ClipSpec(_EVA01_G, _TEXT_H),
    "eva02_b16": ClipSpec(
        _eva02_vit(224, 16, 768, 12, 12, 2048, 512), _clip_text(512, 8, act="gelu")
    ),
    "eva02_l14": ClipSpec(
        _eva02_vit(224, 14, 1024, 24, 16, 2730, 768), _clip_text(768, 12, act="gelu")
    ),
    "eva02_l14_336": ClipSpec(
        _eva02_vit(336, 14, 1024, 24, 16, 2730, 768), _clip_text(768, 12, act="gelu")
    ),
    # Released UTA: the student, beside the text tower that it is aligned to (jihaonew/UTA).
    "uta_b16": ClipSpec(_uta_vit(224, 16, 768, 12, 12, 2048), _TEXT_H),
    "uta_l14_336": ClipSpec(_uta_vit(336, 14, 1024, 24, 16, 2730), _TEXT_H),
    "uta_g14_336": ClipSpec(_uta_vit(336, 14, 1408, 40, 16, 4096), _TEXT_H),
    # google/siglip-base-patch16-224 and google/siglip2-base-patch16-224.
    "siglip_b16": _siglip(224, 16, 768, 12, 12, 3072, 32000),
    "siglip2_b16": _siglip(224, 16, 768, 12, 12, 3072, 256000),
    # The same shapes in open_clip and timm: exact GELU in the tower of timm, and in SigLIP's text.
    "siglip_b16_gelu": _exact(_siglip(224, 16, 768, 12, 12, 3072, 32000), "gelu"),
    "siglip2_b16_gelu": _exact(_siglip(224, 16, 768, 12, 12, 3072, 256000), "gelu_tanh"),
    # The emoji world of configs/emoji_clip.py.
    "tiny_clip": ClipSpec(_TINY_VIT, _TINY_TEXT),
}

VIT: dict[str, VitSpec] = {
    # The released students of UTA (below, with CLIP) at the size of their pre-training recipes
    # here; eva_vit_model/eva_vit.py: hidden = int(width * mlp_ratio).
    "uta_l14": _uta_vit(224, 14, 1024, 24, 16, 2730),
    "uta_g14": _uta_vit(224, 14, 1408, 40, 16, 4096),
    # facebook/dinov2-*: frozen vision towers, without a text tower of their own.
    "dinov2_s14": _dinov2(384, 12, 6),
    "dinov2_b14": _dinov2(768, 12, 12),
    "dinov2_l14": _dinov2(1024, 24, 16),
    "dinov2_g14": _dinov2(1536, 40, 24, act="swiglu", mlp_hidden=4096),
    # Small ones for laptops and tests. uta_tiny has every trait of the released students.
    "uta_tiny": _uta_vit(64, 8, 128, 4, 4, 340, out_dim=64),
    **{name: clip.vision for name, clip in CLIP.items()},
}


def resized(spec: VitSpec, image_size: int) -> VitSpec:
    """The same architecture at another input size (its learned positions must be resampled)."""
    return replace(spec, image_size=image_size)


def with_vision(spec: ClipSpec, vision: VitSpec) -> ClipSpec:
    """``spec`` around another tower, whose crop is as large a share of the resized image."""
    resize_size = round(spec.resize_size * vision.image_size / spec.vision.image_size)
    return replace(spec, vision=vision, resize_size=resize_size)


def tower_alone(name: str) -> ClipSpec:
    """The vision tower of a preset without its text tower, and the pixels that it was made for."""
    if name in CLIP:
        return replace(CLIP[name], text=None, logit_bias=False, tokenizer="clip")
    if name.startswith("dinov2_"):  # resized to 256 for a crop of 224, here at the stored size
        resize_size = VIT[name].image_size * 256 // 224
        return ClipSpec(VIT[name], None, IMAGENET_MEAN, IMAGENET_STD, resize_size=resize_size)
    return ClipSpec(VIT[name], None)
