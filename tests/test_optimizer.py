"""Schedule, decay, clipping, average: each against the numbers it promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uta_jax import UserError
from uta_jax.models.presets import CLIP, VIT
from uta_jax.models.text import init_text
from uta_jax.models.vit import init_vit
from uta_jax.optimizer import AdamW, decay_mask, make_optimizer, schedule, update_ema

RECIPE = AdamW(lr=1e-3, total_steps=100, warmup_steps=10, start_lr=1e-6, end_lr=1e-5)


def clip_shapes():
    """A student of every trait and a text tower: all kinds of parameter that there are."""

    def init():
        key = jax.random.key(0)
        vision = init_vit(VIT["uta_tiny"], key)
        normed = init_vit(CLIP["tiny_clip"].vision, key)  # has embed_norm
        text = init_text(CLIP["tiny_clip"].text, key)
        return {"vision": vision, "clip": normed, "text": text, "logit_scale": jnp.float32(1)}

    return jax.eval_shape(init)


def test_schedule_start_peak_and_end():
    rate = schedule(RECIPE)
    assert float(rate(0)) == pytest.approx(1e-6, rel=1e-4)  # a difference of fp32 numbers
    assert float(rate(5)) == pytest.approx((1e-6 + 1e-3) / 2)
    assert float(rate(10)) == pytest.approx(1e-3)
    assert float(rate(100)) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("step", [11, 40, 55, 99])
def test_schedule_is_a_cosine_after_the_warm_up(step):
    cosine = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
    assert float(schedule(RECIPE)(step)) == pytest.approx(1e-5 + 99e-5 * cosine, rel=1e-4)


def test_schedule_without_warm_up_starts_at_the_peak():
    assert float(schedule(AdamW(lr=1e-3, total_steps=10))(0)) == pytest.approx(1e-3)


def test_decay_is_for_kernels_and_embeddings():
    decays = jax.tree.leaves_with_path(decay_mask(clip_shapes()))
    assert {path[-1].key for path, on in decays if on} == {"kernel", "embedding"}
    assert {path[-1].key for path, on in decays if not on} == {
        "bias", "scale", "pos_embed", "cls_token", "logit_scale"
    }  # fmt: skip


def test_a_parameter_without_a_decay_row_is_an_error():
    with pytest.raises(UserError, match="weight decay table covers parameter 'vision/gamma'"):
        decay_mask({"vision": {"gamma": np.zeros(3)}})


def test_without_gradient_only_what_decays_moves():
    """And it moves by rate x decay of itself, whatever the moments."""
    params = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim), clip_shapes())
    optimizer = make_optimizer(AdamW(lr=0.1, total_steps=10, weight_decay=0.5))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        expected = -0.05 if path[-1].key in ("kernel", "embedding") else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


def step_of(recipe, gradient):
    """The first update of a single kernel."""
    params = {"kernel": jnp.zeros_like(gradient)}
    optimizer = make_optimizer(recipe)
    updates, state = optimizer.update({"kernel": gradient}, optimizer.init(params), params)
    return updates["kernel"], state


def first_moment(state):
    return next(s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))["kernel"]


def is_adam(node):
    return hasattr(node, "mu")


def test_clipping_bounds_the_norm_and_leaves_small_gradients():
    """Seen in the first moment, (1 - b1) x gradient: Adam's update itself forgets the scale."""
    recipe = AdamW(lr=1.0, total_steps=10, clip_norm=2.0)
    large, small = jnp.full((4,), 5.0), jnp.full((4,), 0.5)  # norms 10 and 1
    for gradient, norm in ((large, 2.0), (small, 1.0)):
        _, state = step_of(recipe, gradient)
        assert float(optax.tree.norm(first_moment(state))) == pytest.approx(0.1 * norm, rel=1e-5)
    _, state = step_of(AdamW(lr=1.0, total_steps=10), large)
    assert float(optax.tree.norm(first_moment(state))) == pytest.approx(1.0, rel=1e-5)


def test_moments_are_fp32_and_betas_are_used():
    gradient = jnp.array([2.0, -3.0])
    update, state = step_of(AdamW(lr=0.1, total_steps=10, b1=0.8, b2=0.99, eps=1e-8), gradient)
    np.testing.assert_allclose(update, -0.1 * jnp.sign(gradient), rtol=1e-5)
    np.testing.assert_allclose(first_moment(state), 0.2 * gradient, rtol=1e-6)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype(jnp.float32)}


def test_ema_after_three_updates():
    """d^3 e0 + (1 - d) (d^2 p1 + d p2 + p3)."""
    average = {"w": jnp.float32(4.0)}
    for value in (1.0, 2.0, 3.0):
        average = update_ema(average, {"w": jnp.float32(value)}, 0.9)
    expected = 0.729 * 4 + 0.1 * (0.81 * 1 + 0.9 * 2 + 3)
    assert float(average["w"]) == pytest.approx(expected, rel=1e-6)
