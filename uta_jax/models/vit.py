"""One vision transformer for CLIP, EVA and UTA, on any subset of its patch tokens.

A dropped patch costs nothing: its pixels are left behind before the patch embedding, and positions,
learned and rotary, are looked up for the kept patches only.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uta_jax import mesh
from uta_jax.models.attention import Attention, Tokens, apart, each, one_by_one, rope_table, show
from uta_jax.models.heads import TokenHead, dense, layer_norm
from uta_jax.models.presets import TextSpec, VitSpec


def gelu(x: Array) -> Array:
    """``x Phi(x)`` by the error function in fp32, as PyTorch computes it.

    ``jax.nn.gelu`` takes erfc, of which a vector unit computes both branches everywhere. On TPU
    even erf takes longer than the matrix product beside it, and bfloat16 goes by
    ``_gelu_by_tanh``: by the compiler's estimate a UTA-B/16 step is 6 % shorter on v6e.
    """

    def exact(x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)

    if x.dtype != jnp.bfloat16:
        return exact(x)
    return jax.lax.platform_dependent(x, tpu=_gelu_by_tanh, default=exact)


def _gelu_by_tanh(x: Array) -> Array:
    """``gelu`` within 2.6e-5 before it is rounded to the dtype of ``x``.

    ``Phi(x) = (1 + tanh(x p(x^2))) / 2`` with a polynomial fitted to the least largest error of
    ``x Phi(x)`` (``gelu_tanh`` has one degree less, and 4.7e-4).
    """
    x32 = x.astype(jnp.float32)
    square = jnp.minimum(jnp.square(x32), 32.0)  # the polynomial turns round beyond 50
    inner = x32 * (0.797507805 + square * (0.0370057144 - 0.000351527348 * square))
    return (0.5 * x32 * (1.0 + jnp.tanh(inner))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": partial(nn.gelu, approximate=True),  # SigLIP
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI CLIP
}

# What the backward pass keeps of each block beside its input: everything; the results of the linear
# maps (attention's scores, norms and activations are computed again); of attention what enters it
# and the tokens after it; or nothing.
REMAT = {
    "none": None,
    "attn": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("qkv", "attended"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def patchify(image_bhwc: Array, patch_size: int) -> Array:
    """[b, h, w, c] -> [b, n, p]: row-major patches, each flattened as (row, column, channel)."""
    b, h, w, c = image_bhwc.shape
    gh, gw = h // patch_size, w // patch_size
    x = image_bhwc.reshape(b, gh, patch_size, gw, patch_size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * gw, patch_size * patch_size * c)


def gather_tokens(x_bnd: Array, keep_bk: Array) -> Array:
    """Rows ``keep_bk`` (int, within range) of each example: [b, n, d] -> [b, k, d].

    ``mode="clip"``: indices are in range by construction, and the default fill mode costs far more.
    """
    return jnp.take_along_axis(x_bnd, keep_bk[:, :, None], axis=1, mode="clip")


class Mlp(nn.Module):
    """Two-layer perceptron or SwiGLU; optional norm over the hidden layer (EVA-02's sub-LN)."""

    spec: VitSpec | TextSpec
    dtype: jnp.dtype
    gain: float

    @nn.compact
    def __call__(self, x_bnd: Array) -> Array:
        linear = partial(dense, gain=self.gain, dtype=self.dtype, inside=self.path)
        hidden = linear(self.spec.mlp_hidden, name="up")(x_bnd)
        if self.spec.act == "swiglu":
            hidden = nn.silu(linear(self.spec.mlp_hidden, name="gate")(x_bnd)) * hidden
        else:
            hidden = ACTIVATIONS[self.spec.act](apart(hidden))
        if self.spec.mlp_norm:
            hidden = layer_norm(self.spec.ln_eps, self.dtype, "norm")(hidden)
        return linear(self.spec.width, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block, in the (carry, output) form that ``nn.scan`` takes."""

    spec: VitSpec | TextSpec
    dtype: jnp.dtype
    causal: bool = False

    def _layer_scale(self, name: str) -> Callable[[Array], Array]:
        if not self.spec.layer_scale:
            return lambda y_bnd: y_bnd
        init = nn.initializers.constant(1e-5)  # DINOv2's own for training from scratch
        scale_d = self.param(name, init, (self.spec.width,)).astype(self.dtype)
        return lambda y_bnd: y_bnd * scale_d[None, None]

    @nn.compact
    def __call__(
        self, x_bnd: Tokens | list[Tokens], rope: tuple[Array, Array] | None
    ) -> tuple[Tokens | list[Tokens], None]:
        """A list holds groups of images, which are taken through the block one after the other."""
        spec, dtype, grouped = self.spec, self.dtype, isinstance(x_bnd, list)
        # Sub-LN undoes the scale of what enters it; the published init makes up for it.
        gain = math.sqrt(math.log(2 * spec.depth)) if spec.mlp_norm else 1.0
        norm1, norm2 = (layer_norm(spec.ln_eps, dtype, name) for name in ("norm1", "norm2"))
        attn = Attention(spec, dtype, gain, self.causal, stored=grouped, name="attn")
        mlp = Mlp(spec, dtype, gain, name="mlp")
        scale1, scale2 = self._layer_scale("layer_scale1"), self._layer_scale("layer_scale2")

        def run(x_bnd: Tokens) -> Tokens:
            y_bnd = each(scale1, attn(each(norm1, x_bnd), rope))
            x_bnd = checkpoint_name(each(jnp.add, x_bnd, y_bnd), "attended")
            y_bnd = each(scale2, each(mlp, each(norm2, x_bnd)))
            return each(jnp.add, x_bnd, y_bnd)

        x_bnd = one_by_one(run, x_bnd) if grouped else run(x_bnd)
        show(self, "layers", lambda: x_bnd)
        return x_bnd, None


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens, and an MLP after it (SigLIP's MAP head)."""

    spec: VitSpec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bnd: Array) -> Array:
        """Normed tokens [b, n, d] -> [b, d]."""
        spec, dtype = self.spec, self.dtype
        probe = self.param("probe", nn.initializers.truncated_normal(0.02), (spec.width,))
        probe_b1d = jnp.broadcast_to(probe.astype(dtype), (x_bnd.shape[0], 1, spec.width))
        x_b1d = Attention(spec, dtype, gain=1.0, name="attn")(x_bnd, query_bqd=probe_b1d)
        y_b1d = layer_norm(spec.ln_eps, dtype, "norm")(x_b1d)
        return (x_b1d + Mlp(spec, dtype, gain=1.0, name="mlp")(y_b1d))[:, 0]


def block_stack(
    spec: VitSpec | TextSpec, dtype, remat: str = "none", causal: bool = False, unroll: bool = False
):
    """``spec.depth`` blocks as one scanned module: parameters stack on a leading depth axis."""
    block = Block
    if REMAT[remat] is not None:
        block = nn.remat(Block, policy=REMAT[remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0, "layers": 0, "cls_attention": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=spec.depth,
        unroll=spec.depth if unroll else 1,
    )
    return stack(spec, dtype, causal, name="blocks")


class PatchEmbed(nn.Module):
    """Linear map of flattened patches: a convolution whose stride is its size.

    Of an image with a mask, the pixels of the kept patches are gathered first and nothing of a
    dropped one is computed. A whole image is convolved: on CPU, XLA then adds in the order of
    PyTorch's convolution, and fp32 tokens agree three times as closely as after a matrix product.
    """

    spec: VitSpec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image_bhwc: Array, keep_bk: Array | None) -> Array:
        """[b, h, w, 3] -> [b, k, d]; all patches, row-major, where ``keep_bk`` is None."""
        size, width = self.spec.patch_size, self.spec.width
        shape = (3 * size**2, width)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        kernel, image_bhwc = mesh.gather(kernel.astype(self.dtype)), image_bhwc.astype(self.dtype)
        if keep_bk is None:
            x_bkd = _convolve(image_bhwc, kernel, size)
        else:
            x_bkd = gather_tokens(patchify(image_bhwc, size), keep_bk) @ kernel
        if self.spec.patch_bias:
            bias = self.param("bias", nn.initializers.zeros, (width,))
            x_bkd = x_bkd + bias.astype(self.dtype)[None, None]
        return x_bkd


def _convolve(image_bhwc: Array, kernel_pd: Array, size: int) -> Array:
    """``patchify(image_bhwc, size) @ kernel_pd`` as a convolution."""
    kernel = kernel_pd.reshape(size, size, 3, -1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        image_bhwc, kernel, (size, size), "VALID", dimension_numbers=dimensions
    )
    return x.reshape(len(image_bhwc), -1, kernel_pd.shape[1])


class Vit(nn.Module):
    """Vision transformer over CLS and all, or only the kept, patches.

    ``spec`` says the architecture; ``dtype`` is that of activations and products, while parameters,
    LayerNorm statistics and softmax stay fp32; ``remat`` is a key of ``REMAT``;
    ``unroll`` writes the blocks out, for XLA counts the operations of a loop's body once;
    ``split`` keeps CLS apart from the patches within the blocks (``attention.attend_apart``);
    ``groups``: the images are taken through each block in so many, one after the other.
    """

    spec: VitSpec
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False
    split: bool = False
    groups: int = 1

    def setup(self):
        spec = self.spec
        token_init = nn.initializers.truncated_normal(0.02)
        self.patch_embed = PatchEmbed(spec, self.dtype)
        if spec.cls:
            self.cls_token = self.param("cls_token", token_init, (spec.width,))
        rows = int(spec.cls) + spec.tokens
        self.pos_embed = self.param("pos_embed", token_init, (rows, spec.width))
        if spec.embed_norm:
            self.embed_norm = layer_norm(spec.ln_eps, self.dtype)
        self.blocks = block_stack(spec, self.dtype, self.remat, unroll=self.unroll)
        out_dim = spec.out_dim if spec.head_proj else None
        self.head = TokenHead(out_dim, spec.ln_eps, spec.head_bias, self.dtype)
        if spec.pool == "map":
            self.pool = AttentionPool(spec, self.dtype)

    def __call__(self, image_bhwc: Array, keep_bk: Array | None = None) -> Array:
        """Normalised float images [b, h, w, 3] -> projected tokens [b, 1 + k, e], CLS first.

        ``keep_bk``: int32 indices of the patches to run on, row-major, 0-based; None keeps all.
        Of a tower that pools by attention, the pooled token stands in the place of CLS.
        """
        tokens_bke = self.project(self.encode(image_bhwc, keep_bk))
        if self.spec.pool == "cls":
            return tokens_bke
        return jnp.concatenate([self.pool(tokens_bke)[:, None], tokens_bke], axis=1)

    def features(self, image_bhwc: Array, keep_bk: Array | None = None) -> Array:
        """What stands for the whole image in the joint space: [b, e], not normalised."""
        tokens_bkd = self.encode(image_bhwc, keep_bk)
        if self.spec.pool == "cls":
            return self.project(tokens_bkd[:, 0])
        return self.pool(self.project(tokens_bkd))

    def encode(
        self,
        image_bhwc: Array,
        keep_bk: Array | None = None,
        blank: tuple[Array, Array] | None = None,
    ) -> Array:
        """The tokens [b, 1 + k, d] before the final norm; [b, k, d] without a class token.

        ``blank``: (bool [b, k], token [d]); the patches where it is true are not seen: the token
        stands in the place of their embedding, and keeps their position.
        """
        x_bkd, rope = self._embed(image_bhwc, keep_bk, blank)
        if self.spec.embed_norm:
            x_bkd = self.embed_norm(x_bkd)
        if self.groups == 1 and not self.split:
            return self.blocks(x_bkd, rope)[0]
        # Rows take turns in the groups, so that each device has its share of every group.
        x_bgkd = x_bkd.reshape(-1, self.groups, *x_bkd.shape[1:])
        groups = [x_bgkd[:, i] for i in range(self.groups)]
        if self.split:
            rope = rope and tuple(table[:, 1:] for table in rope)  # CLS is not turned
            groups = [(x[:, :1], x[:, 1:]) for x in groups]
        if self.groups == 1:
            groups = [self.blocks(groups[0], rope)[0]]
        else:
            groups, _ = self.blocks(groups, rope)
        if self.split:
            groups = [jnp.concatenate(x, axis=1) for x in groups]
        return jnp.stack(groups, axis=1).reshape(x_bkd.shape)

    def project(self, tokens_bkd: Array) -> Array:
        """Final norm and projection of any tokens: [b, k, d] -> [b, k, e]."""
        return self.head(tokens_bkd)

    def _embed(self, image_bhwc, keep_bk, blank):
        x_bkd = self.patch_embed(image_bhwc, keep_bk)
        if blank is not None:
            blank_bk, token_d = blank
            x_bkd = jnp.where(blank_bk[..., None], token_d.astype(self.dtype)[None, None], x_bkd)
        place_bk = jnp.arange(self.spec.tokens)[None] if keep_bk is None else keep_bk
        if self.spec.cls:
            # Row 0 of every table belongs to CLS.
            place_bk = jnp.pad(place_bk + 1, ((0, 0), (1, 0)))
            cls_b1d = jnp.broadcast_to(
                self.cls_token.astype(self.dtype), (len(image_bhwc), 1, self.spec.width)
            )
            x_bkd = jnp.concatenate([cls_b1d, x_bkd], axis=1)
        x_bkd = x_bkd + _rows(mesh.gather(self.pos_embed.astype(self.dtype)), place_bk)
        if not self.spec.rope_theta:
            return x_bkd, None
        return x_bkd, tuple(_rows(t, place_bk)[:, :, None] for t in rope_table(self.spec))


def _rows(table_nd: Array, place_bk: Array) -> Array:
    return jnp.take(table_nd, place_bk, axis=0, mode="clip")


class Seen(NamedTuple):
    """What a pass through the blocks shows; None for what was not asked for."""

    tokens_bkd: Array  # before the final norm, CLS first
    layers_lbkd: Array | None  # the output of every block
    cls_attention_bk: Array | None  # of the last block, CLS to itself and the patches, fp32


def encode_seen(
    vit: Vit,
    params: dict,
    image_bhwc: Array,
    keep_bk: Array | None = None,
    layers: bool = False,
    attention: bool = False,
) -> Seen:
    """``vit.encode`` with the outputs of all its blocks, or the attention of CLS."""
    asked = [n for n, on in (("layers", layers), ("cls_attention", attention)) if on]
    found = vit.apply({"params": params}, image_bhwc, keep_bk, method="encode", mutable=asked)
    tokens_bkd, shown = found
    outputs = shown["layers"]["blocks"]["seen"][0] if layers else None
    weights = shown["cls_attention"]["blocks"]["attn"]["seen"][0][-1] if attention else None
    return Seen(tokens_bkd, outputs, weights)


def init_vit(spec: VitSpec, key: Array) -> dict:
    """Fresh fp32 parameters (maps: ``heads.dense``; tokens, positions truncated normal 0.02)."""
    image = jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.float32)
    return Vit(spec).init(key, image)["params"]
