"""The text tower of CLIP (Radford et al. 2021) and of SigLIP (Zhai et al. 2023)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from uta_jax import mesh
from uta_jax.models.heads import TokenHead
from uta_jax.models.presets import TextSpec
from uta_jax.models.vit import block_stack


class TokenEmbed(nn.Module):
    """The table of token embeddings [vocab, d]."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        init = nn.initializers.normal(0.02)
        return self.param("embedding", init, (self.vocab, self.width))


class TextTower(nn.Module):
    """Transformer over all positions, pooled at one of them: at end-of-text or at the last."""

    spec: TextSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids_bl: Array) -> Array:
        """int32 token ids [b, l], l = spec.context -> features [b, e], not normalised."""
        spec = self.spec
        table_vd = TokenEmbed(spec.vocab, spec.width, name="token_embed")().astype(self.dtype)
        pos = self.param("pos_embed", nn.initializers.normal(0.01), (spec.context, spec.width))
        x_bld = jnp.take(mesh.gather(table_vd), ids_bl, axis=0, mode="clip")
        x_bld = x_bld + mesh.gather(pos.astype(self.dtype))[None]
        x_bld, _ = block_stack(spec, self.dtype, causal=spec.causal)(x_bld, None)
        if spec.pool == "end":
            end_b = jnp.argmax(ids_bl, axis=-1)
            x_bd = jnp.take_along_axis(x_bld, end_b[:, None, None], axis=1, mode="clip")[:, 0]
        else:
            x_bd = x_bld[:, -1]
        return TokenHead(spec.out_dim, spec.ln_eps, spec.head_bias, self.dtype, name="head")(x_bd)


def init_text(spec: TextSpec, key: Array) -> dict:
    """Fresh fp32 parameters."""
    return TextTower(spec).init(key, jnp.zeros((1, spec.context), jnp.int32))["params"]
