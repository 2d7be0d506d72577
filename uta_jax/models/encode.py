"""Features by either tower, outside of training: one function for images, one for texts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uta_jax import UserError
from uta_jax.data.transforms import to_input
from uta_jax.models.presets import ClipSpec, TextSpec
from uta_jax.models.text import TextTower
from uta_jax.models.vit import Vit


@partial(jax.jit, static_argnames=("spec", "dtype", "tokens"))
def encode_images(
    params: dict,
    image_bhwc: Array,
    keep_bk: Array | None = None,
    *,
    spec: ClipSpec,
    dtype: str = "float32",
    tokens: bool = False,
) -> Array:
    """Features fp32 [b, e], or with ``tokens`` all projected ones [b, 1 + k, e], CLS first.

    ``params``: the vision tower's. ``image_bhwc``: uint8 pixels, or floats normalised already.
    ``keep_bk``: the patches that the network runs on beside CLS. Not L2-normalised.
    """
    if image_bhwc.dtype == jnp.uint8:
        image_bhwc = to_input(image_bhwc, spec.mean, spec.std, spec.vision.image_size)
    method = "__call__" if tokens else "features"
    with _precision(dtype):
        vit = Vit(spec.vision, jnp.dtype(dtype))
        found = vit.apply({"params": params}, image_bhwc, keep_bk, method=method)
    return found.astype(jnp.float32)


@partial(jax.jit, static_argnames=("spec", "dtype"))
def encode_texts(params: dict, ids_bl: Array, *, spec: TextSpec, dtype: str = "float32") -> Array:
    """Text features fp32 [b, e], not L2-normalised. ``params``: the text tower's."""
    with _precision(dtype):
        features = TextTower(spec, jnp.dtype(dtype)).apply({"params": params}, ids_bl)
    return features.astype(jnp.float32)


def _precision(dtype: str):
    """float32 means it: accelerators otherwise multiply in fewer bits."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def check_ids(ids_bl: np.ndarray, spec: TextSpec) -> np.ndarray:
    """``ids_bl`` itself; UserError for ids that the tower has no embedding of."""
    if ids_bl.size and ids_bl.max() >= spec.vocab:
        raise UserError(
            f"the tokenizer gives id {ids_bl.max()}, but the text tower knows {spec.vocab} tokens: "
            "it was trained with another tokenizer"
        )
    return ids_bl
