"""Multi-head self-attention, with rotary positions where a tower has them."""

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


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are separate maps with their heads kept apart."""

    spec: VitSpec | TextSpec
    dtype: jnp.dtype
    gain: float
    causal: bool = False

    @nn.compact
    def __call__(
        self, x_bnd: Array, rope: tuple[Array, Array] | None = None, query_bqd: Array | None = None
    ) -> Array:
        heads, width = self.spec.heads, self.spec.width
        inputs = {"q": x_bnd if query_bqd is None else query_bqd, "k": x_bnd, "v": x_bnd}
        q, k, v = (
            dense(
                (heads, width // heads),
                use_bias=name in self.spec.qkv_bias,
                gain=self.gain if name == "v" else 1.0,
                dtype=self.dtype,
                name=name,
                inside=self.path,
            )(inputs[name])
            for name in "qkv"
        )
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = apart(tuple(checkpoint_name(x, "qkv") for x in (q, k, v)))
        show(self, "cls_attention", lambda: _first_token_attention(q, k))
        x_bnhd = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        if self.spec.attn_norm:
            norm = layer_norm(self.spec.ln_eps, self.dtype, "norm")
            x_bnhd = norm(x_bnhd.reshape(*x_bnhd.shape[:2], width)).reshape(x_bnhd.shape)
        proj = partial(dense, axis=(-2, -1), gain=self.gain, dtype=self.dtype, inside=self.path)
        return proj(width, name="proj")(x_bnhd)


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
