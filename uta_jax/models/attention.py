"""Multi-head self-attention, with rotary positions where a tower has them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uta_jax.models.heads import dense, layer_norm
from uta_jax.models.presets import TextSpec, VitSpec


def rope_table(spec: VitSpec) -> tuple[Array, Array]:
    """Cosine and sine [1 + n, head_dim] of the 2-D rotary positions; CLS first, unrotated.

    Frequencies theta^(-2i/m) with m = head_dim / 2, each standing for a pair of channels; the first
    half of the channels turns with the row, the second with the column; position j of a grid g is
    j / g * rope_grid (jihaonew/UTA, eva_vit_model/rope.py, VisionRotaryEmbeddingFast).
    """
    half = spec.width // spec.heads // 2
    freq = spec.rope_theta ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    place = jnp.arange(spec.grid, dtype=jnp.float32) / spec.grid * spec.rope_grid
    angle_gf = jnp.repeat(jnp.outer(place, freq), 2, axis=-1)
    shape = (spec.grid, spec.grid, half)
    rows, columns = angle_gf[:, None, :], angle_gf[None, :, :]
    angle = jnp.concatenate([jnp.broadcast_to(a, shape) for a in (rows, columns)], axis=-1)
    angle = jnp.pad(angle.reshape(spec.tokens, 2 * half), ((int(spec.cls), 0), (0, 0)))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_bnhd: Array, rope: tuple[Array, Array]) -> Array:
    """Turn interleaved channel pairs of [b, n, heads, head_dim] by [b or 1, n, 1, head_dim].

    The quarter turn (x0, x1) -> (-x1, x0) is a product with a signed permutation, exact in any
    dtype: by the TPU compiler's estimate, picking channels apart costs more than attention itself.
    """
    cos, sin = rope
    pairs = np.kron(np.eye(x_bnhd.shape[-1] // 2), [[0, 1], [-1, 0]])
    quarter = jnp.asarray(pairs, x_bnhd.dtype)
    turned = jnp.einsum("bnhd,de->bnhe", x_bnhd, quarter, precision="highest")
    return (x_bnhd * cos + turned * sin).astype(x_bnhd.dtype)


Tokens = Array | tuple[Array, Array]  # [b, n, d], or CLS apart: [b, 1, d] and the patches
each = jax.tree.map  # over all tokens, or CLS and the patches


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are separate maps with their heads kept apart."""

    spec: VitSpec | TextSpec
    dtype: jnp.dtype
    gain: float
    causal: bool = False
    stored: bool = False  # on TPU, what is attended to, before it is projected

    @nn.compact
    def __call__(
        self,
        x_bnd: Tokens,
        rope: tuple[Array, Array] | None = None,
        query_bqd: Array | None = None,
    ) -> Tokens:
        """``rope``: of all tokens; of the patches alone where CLS is apart."""
        width = self.spec.width
        inputs = {"q": x_bnd if query_bqd is None else query_bqd, "k": x_bnd, "v": x_bnd}
        q, k, v = (each(self._map(name), inputs[name]) for name in "qkv")
        if rope is not None:
            q, k = _turned(q, rope), _turned(k, rope)
        q, k, v = checkpoint_name((q, k, v), "qkv")
        # Not v: in the backward pass the sum for its bias would be a loop of its own, by the TPU
        # compiler's estimate 4 % of a UTA-B/16 block on v5e.
        q, k = apart((q, k))
        show(self, "cls_attention", lambda: _first_token_attention(q, k))
        if isinstance(x_bnd, tuple):
            x_bnhd = attend_apart(q, k, v)
        else:
            x_bnhd = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        if self.stored:
            x_bnhd = apart(x_bnhd)
        if self.spec.attn_norm:
            norm = layer_norm(self.spec.ln_eps, self.dtype, "norm")
            x_bnhd = each(lambda x: norm(x.reshape(*x.shape[:2], width)).reshape(x.shape), x_bnhd)
        proj = partial(dense, axis=(-2, -1), gain=self.gain, dtype=self.dtype, inside=self.path)
        return each(proj(width, name="proj"), x_bnhd)

    def _map(self, name: str) -> nn.Module:
        """[b, n, d] -> [b, n, heads, head_dim]: q, k or v."""
        return dense(
            (self.spec.heads, self.spec.width // self.spec.heads),
            use_bias=name in self.spec.qkv_bias,
            gain=self.gain if name == "v" else 1.0,
            dtype=self.dtype,
            name=name,
            inside=self.path,
        )


def _turned(x_bnhd: Tokens, rope: tuple[Array, Array]) -> Tokens:
    if isinstance(x_bnhd, tuple):
        cls, patches = x_bnhd
        return cls, rotate(patches, rope)
    return rotate(x_bnhd, rope)


def attend_apart(q: tuple, k: tuple, v: tuple) -> tuple[Array, Array]:
    """``jax.nn.dot_product_attention`` of CLS [b, 1, h, d] and patches [b, n, h, d] kept apart.

    For TPU: 16 x 16 patches fill the tiles of its vector units, and 257 tokens take the room of
    384. By the compiler's estimate a layer of an EVA01-g teacher is a seventh shorter on v5e and on
    v5p; 14 x 14 patches are better left with CLS.
    """
    # A lone row or column would be multiplied out by the vector unit: eight equal ones are not.
    eight = partial(jnp.repeat, repeats=8, axis=1)
    cls = _attend_to_both(eight(q[0]), eight(k[0]), k[1], v)[:, :1]
    return cls, _attend_to_both(q[1], eight(k[0]), k[1], v)


def _attend_to_both(q_bqhd: Array, cls_b8hd: Array, k_bnhd: Array, v: tuple) -> Array:
    """Attention of any queries; the weights' sum is a column of the product with the values."""
    scale = q_bqhd.shape[-1] ** -0.5
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    cls_bhq1 = product("bqhd,bkhd->bhqk", q_bqhd, cls_b8hd)[..., :1] * scale
    logit_bhqn = product("bqhd,bkhd->bhqk", q_bqhd, k_bnhd) * scale
    top_bhq1 = jnp.maximum(logit_bhqn.max(axis=-1, keepdims=True), cls_bhq1)
    weight_bhqn = jnp.exp(logit_bhqn - top_bhq1).astype(q_bqhd.dtype)
    v_cls, v_bnhd = (jnp.pad(x, ((0, 0),) * 3 + ((0, 1),), constant_values=1) for x in v)
    sum_bhqd = product("bhqk,bkhd->bhqd", weight_bhqn, v_bnhd)
    sum_bhqd += jnp.exp(cls_bhq1 - top_bhq1) * v_cls.astype(jnp.float32).swapaxes(1, 2)
    return (sum_bhqd[..., :-1] / sum_bhqd[..., -1:]).astype(q_bqhd.dtype).swapaxes(1, 2)


def _first_token_attention(q_bnhd: Array, k_bnhd: Array) -> Array:
    """What the first token attends to, averaged over the heads: fp32 [b, n]."""
    logits_bhn = jnp.einsum("bhd,bnhd->bhn", q_bnhd[:, 0], k_bnhd).astype(jnp.float32)
    return nn.softmax(logits_bhn * q_bnhd.shape[-1] ** -0.5).mean(axis=1)


def show(module: nn.Module, collection: str, make) -> None:
    """Leave ``make()`` in ``collection`` for a caller who asks for it (``encode_seen``)."""
    if module.is_mutable_collection(collection) and not module.is_initializing():
        module.sow(collection, "seen", make())


def apart(x):
    """Arrays as they are; on TPU, what comes before and after them is compiled apart.

    Left alone, the TPU compiler makes one loop of both products of an MLP and runs it at 0.7 of the
    peak by its own estimate; apart they reach 0.9. It also computes k within the loop that
    multiplies it by q, and then the softmax no longer fits in there: a g/14 teacher's layer takes
    15 % longer on v5p.
    """
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def one_by_one(function: Callable, groups: list) -> list:
    """``function`` of each; on TPU, none is begun before the last is done.

    So what a block computes of a few images stays in the memory beside the vector units. By the
    compiler's estimate 64 images at 196 px take EVA01-g, 16 at a time, 9 % less on v5e and 16 % on
    v6e.
    """
    done = []
    for group in groups:
        if done:
            done[-1], group = apart((done[-1], group))
        done.append(function(group))
    return done
