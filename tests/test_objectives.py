"""What the losses are, and what they must not see."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uta_jax import masking, mesh
from uta_jax.models import presets
from uta_jax.models.vit import init_vit
from uta_jax.objectives import (
    GROUP_BYTES,
    OBJECTIVES,
    Task,
    _groups,
    alignment_loss,
    contrastive,
    cosine,
    run_teacher,
    uta,
)

VISION = replace(presets.VIT["tiny_clip"], width=32, heads=2, mlp_hidden=48, depth=2, out_dim=16)
TEXT = presets.TextSpec(8, 64, 16, 1, 2, 32, 16)
CLIP = presets.ClipSpec(VISION, TEXT)


def _task(kind="random", keep=32, **changes):
    task = Task("uta", VISION, CLIP.mean, CLIP.std, teacher=CLIP, mask=masking.Mask(kind, keep, 4))
    return replace(task, **changes)


def _batch(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)),
        "text": jnp.asarray(rng.integers(1, 63, (batch, 8)), jnp.int32),
    }


def _params(seed):
    return {"vision": init_vit(VISION, jax.random.key(seed))}


def test_a_student_equal_to_the_teacher_that_sees_everything_has_loss_minus_one():
    params = _params(0)
    loss, metrics = uta(params, params, _batch(), jax.random.key(0), _task(keep=64))
    assert abs(float(loss) + 1) < 1e-5
    assert abs(float(metrics["cos_cls"]) - 1) < 1e-5


def test_a_student_equal_to_the_teacher_that_sees_half_has_not():
    params = _params(0)
    loss, _ = uta(params, params, _batch(), jax.random.key(0), _task(keep=32))
    assert -0.9999 < float(loss)


def test_no_gradient_reaches_the_teacher():
    task, rng = _task(), jax.random.key(0)
    grads = jax.grad(lambda f: uta(_params(0), f, _batch(), rng, task)[0])(_params(1))
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("grid", "split"), [(16, True), (8, False)])
def test_on_a_tpu_a_teacher_whose_patches_fill_tiles_runs_with_cls_apart(grid, split):
    teacher = presets.with_vision(CLIP, presets.resized(VISION, 8 * grid))
    task, batch = _task(teacher=teacher), _batch()["image"]
    frozen = {"vision": init_vit(teacher.vision, jax.random.key(0))}
    traced = jax.jit(partial(run_teacher, task=task)).trace(frozen, batch)
    for platform in ("tpu", "cpu"):
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        apart = f"x{grid**2}x{grid**2}xf32>" in hlo  # attention among the patches alone
        assert apart == (split and platform == "tpu")
        assert (f"x{grid**2 + 1}x{grid**2 + 1}xf32>" in hlo) != apart


@pytest.mark.parametrize(
    ("kind", "images", "split", "groups"),
    [
        ("TPU v5 lite", 64, False, 4),
        ("TPU v6 lite", 32, False, 2),
        ("TPU v6 lite", 32, True, 1),
        ("TPU v5 lite", 32, True, 2),
        ("TPU v5", 64, False, 2),
        ("TPU v5", 64, True, 1),
        ("TPU v5 lite", 16, False, 1),  # they fit as they are
        ("TPU v5 lite", 61, False, 1),  # they do not divide
        ("TPU v5 lite", 512, False, 1),  # too many groups
        ("TPU v4", 64, False, 1),
        ("cpu", 64, False, 1),
        ("", 64, False, 1),
    ],
)
def test_groups_in_which_a_teacher_takes_the_images(kind, images, split, groups, monkeypatch):
    monkeypatch.setattr(mesh, "device_kind", lambda: kind)
    monkeypatch.setattr(mesh, "batch_parts", lambda: 16)
    spec = presets.resized(presets.CLIP["eva01_g14_plus"].vision, 196)
    assert _groups(spec, 16 * images, split) == groups


@pytest.mark.parametrize("grid", [16, 8])
def test_on_a_tpu_a_teacher_takes_the_images_in_groups(grid, monkeypatch):
    teacher = presets.with_vision(CLIP, presets.resized(VISION, 8 * grid))
    task, batch = _task(teacher=teacher), _batch(6)["image"]
    frozen = {"vision": init_vit(teacher.vision, jax.random.key(0))}
    monkeypatch.setattr(mesh, "device_kind", lambda: "TPU v5 lite")
    two_images = 2 * 2 * (grid**2 + 1) * VISION.mlp_hidden
    monkeypatch.setitem(GROUP_BYTES, ("TPU v5 lite", grid == 16), two_images)
    traced = jax.jit(partial(run_teacher, task=task)).trace(frozen, batch)
    for platform, images in (("tpu", 2), ("cpu", 6)):
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(rf"(\d+)x{VISION.heads}x(\d+)x(\d+)xf32>", hlo)
        assert {int(b) for b, q, k in found if q == k} == {images}  # in one attention


def test_a_masked_out_patch_changes_the_loss_only_through_the_teacher():
    """With a teacher that does not look, pixels outside the mask leave the loss as it is."""
    task, rng = _task(), jax.random.key(0)
    keep_bk = np.asarray(masking.sample(rng, 4, 8, task.mask))
    shown_bn = np.zeros((4, 64), bool)
    np.put_along_axis(shown_bn, keep_bk, True, axis=1)
    pixels = shown_bn.reshape(4, 8, 8).repeat(8, axis=1).repeat(8, axis=2)[..., None]
    batch, other = _batch(), _batch(seed=1)
    other["image"] = jnp.where(pixels, batch["image"], other["image"])
    blind = jax.tree.map(jnp.array, _params(1))
    blind["vision"]["patch_embed"]["kernel"] *= 0
    params = _params(0)
    losses = [float(uta(params, blind, b, rng, task)[0]) for b in (batch, other)]
    assert losses[0] == losses[1]
    gradients = [
        jax.grad(lambda p, b=b: uta(p, blind, b, rng, task)[0])(params) for b in (batch, other)
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_the_loss_is_the_equation():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    cos = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    for weight in (0.0, 1.0, 2.5):
        loss, _ = alignment_loss(jnp.asarray(s), jnp.asarray(t), weight)
        expected = -(weight * cos[:, 0] + cos[:, 1:].sum(1)).mean() / (weight + 4)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_zero_token_has_a_finite_gradient():
    value, grad = jax.value_and_grad(lambda x: cosine(x, jnp.ones(4)))(jnp.zeros(4))
    assert value == 0 and jnp.isfinite(grad).all()


def test_large_float16_tokens_do_not_overflow():
    token = jnp.full((2, 64), 3e4, jnp.float16)
    np.testing.assert_allclose(cosine(token, token), 1.0, rtol=1e-3)


def test_teacher_of_another_patch_size_meets_the_student_grid():
    teacher = replace(CLIP, vision=replace(VISION, patch_size=7, image_size=56))
    task = _task(teacher=teacher)
    frozen = {"vision": init_vit(teacher.vision, jax.random.key(1))}
    loss, _ = uta(_params(0), frozen, _batch(), jax.random.key(0), task)
    assert jnp.isfinite(loss)


def _contrastive_params():
    task = Task("contrastive", VISION, CLIP.mean, CLIP.std, text=TEXT)
    return task, OBJECTIVES["contrastive"].init(jax.random.key(0), task)


def test_contrastive_is_open_clips_formula():
    task, params = _contrastive_params()
    batch = _batch(6)
    loss, _ = contrastive(params, {}, batch, jax.random.key(0), task)
    # Written out again, in float64 NumPy, from the features.
    from uta_jax.models.text import TextTower
    from uta_jax.objectives import student_input

    image = task.vit().apply({"params": params["vision"]}, student_input(batch["image"], task))[
        :, 0
    ]
    text = TextTower(TEXT).apply({"params": params["text"]}, batch["text"])
    i, t = (np.asarray(x, np.float64) for x in (image, text))
    i, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (i, t))
    logits = i @ t.T / 0.07

    def cross_entropy(z):
        return (np.log(np.exp(z).sum(1)) - np.diag(z)).mean()

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_contrastive_scale_is_bounded_and_can_come_back():
    task, params = _contrastive_params()
    params["logit_scale"] = jnp.float32(10.0)
    bounded = OBJECTIVES["contrastive"].bound(params)
    np.testing.assert_allclose(jnp.exp(bounded["logit_scale"]), 100.0, rtol=1e-5)
    assert bounded["vision"] is params["vision"]

    def loss(p):
        return contrastive(p, {}, _batch(), jax.random.key(0), task)[0]

    assert jax.grad(loss)(bounded)["logit_scale"] > 0  # random pairs: a smaller scale is better


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_all_that_it_initialises(name):
    task = replace(_task(), objective=name, text=TEXT)
    params = OBJECTIVES[name].init(jax.random.key(0), task)
    frozen = {"vision": init_vit(VISION, jax.random.key(1))}

    def loss(p):
        return OBJECTIVES[name].loss(p, frozen, _batch(), jax.random.key(0), task)[0]

    grads = jax.grad(loss)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        # A key's bias shifts every logit of a query alike, which softmax cannot see; maskalign
        # takes its layers before the final norm and has no projection.
        unseen = "'k']['bias'", "['head']" if name == "maskalign" else "'k']['bias'"
        if not any(part in jax.tree_util.keystr(path) for part in unseen):
            assert leaf.any(), path
