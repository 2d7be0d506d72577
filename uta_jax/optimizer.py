"""Gradient transformations as data: which parameters decay, how the rate moves, the update rule."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from uta_jax import mesh

# Path of a parameter -> whether weight decay pulls on it. Biases, norms, positions, CLS and scales
# do not decay (EVA's choice), nor the mixing of layers (MaskAlign's) nor the mask token (ours); the
# stacked depth axis makes the usual test on the rank meaningless.
DECAY: tuple[tuple[str, bool], ...] = (
    (r"(bias|scale|layer_scale[12]|pos_embed|(cls|mask)_token|probe|mix|logit_scale)$", False),
    (r"(kernel|embedding)$", True),
)


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up and a cosine to ``end_lr``; units: steps."""

    lr: float
    total_steps: int
    warmup_steps: int = 0
    start_lr: float = 0.0
    end_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip_norm: float = 0.0  # largest global gradient norm; 0: no clipping


def schedule(recipe: AdamW) -> optax.Schedule:
    """Step (0-based) -> learning rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=recipe.start_lr,
        peak_value=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.total_steps,
        end_value=recipe.end_lr,
    )


def decay_mask(params):
    """The tree of booleans that ``DECAY`` gives ``params``; UserError for a path it lacks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: mesh.first_match(DECAY, mesh.path_name(path), "weight decay"), params
    )


def make_optimizer(recipe: AdamW) -> optax.GradientTransformation:
    """The Optax chain of a recipe: clip, then AdamW with decoupled, masked decay."""
    adamw = optax.adamw(
        schedule(recipe),
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        mask=decay_mask,
        mu_dtype=jnp.float32,
    )
    # An identity where nothing is clipped: the state, and so a checkpoint, is built alike.
    clip = optax.clip_by_global_norm(recipe.clip_norm) if recipe.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def update_ema(ema, params, decay: float):
    """``ema <- decay * ema + (1 - decay) * params``, in fp32."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
