"""The sharded step: the same numbers on every mesh, and really sharded."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from uta_jax import masking, mesh
from uta_jax.models import presets
from uta_jax.models.vit import init_vit
from uta_jax.objectives import Task
from uta_jax.optimizer import AdamW
from uta_jax.step import Recipe, compile_step, init_state

VISION = replace(presets.VIT["tiny_clip"], width=32, heads=2, mlp_hidden=64, depth=2, out_dim=16)
CLIP = replace(presets.CLIP["tiny_clip"], vision=VISION)
STEPS = 20
TASK = Task(
    "uta", VISION, CLIP.mean, CLIP.std, teacher=CLIP, mask=masking.Mask("reversed_block", 32, 4)
)
RECIPE = Recipe(TASK, AdamW(1e-3, STEPS, 4, clip_norm=3.0), ema_decay=0.9)


def _batches(count=STEPS, batch=16):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"image": rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)}


def _train(data: int, fsdp: int, steps: int = STEPS, recipe: Recipe = RECIPE):
    """(losses, state, frozen) of ``steps`` updates on the first data * fsdp devices."""
    devices = mesh.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with jax.set_mesh(devices):
        teacher = mesh.fetch(init_vit(VISION, jax.random.key(9)))
        teacher = jax.tree.map(
            lambda x: x.astype(jax.numpy.dtype(recipe.task.teacher_dtype)), teacher
        )
        frozen = mesh.place(devices, {"vision": teacher})
        state, update = init_state(recipe, devices), compile_step(recipe, devices, frozen)
        losses = []
        for batch in _batches(steps):
            state, metrics = update(
                state, frozen, jax.device_put(batch, mesh.batch_sharding(devices))
            )
            losses.append(float(metrics["loss"]))
    return losses, state, frozen, teacher


@pytest.fixture(scope="module")
def single():
    return _train(1, 1)


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (8, 1), (4, 2), (1, 8)])
def test_the_mesh_does_not_change_the_losses(single, shape):
    losses, state, _, _ = _train(*shape)
    np.testing.assert_allclose(losses, single[0], atol=1e-5)
    assert losses[-1] < losses[0] - 0.01  # it is training, not standing still
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        mesh.fetch(state.params),
        mesh.fetch(single[1].params),
    )


def test_parameters_moments_and_average_are_really_sharded():
    _, state, frozen, _ = _train(1, 8, steps=1)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for tree in (state.params, state.ema, adam.mu, adam.nu, frozen):
        kernel = tree["vision"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.shape == (2, 32, 64)
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 4, 64)}
        assert len({s.device for s in kernel.addressable_shards}) == 8
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    first = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert first < 0.25 * whole  # an eighth, and the small vectors whole


def _is_adam(node) -> bool:
    return hasattr(node, "mu")


def test_the_teacher_is_bitwise_unchanged_and_nowhere_in_the_state(single):
    _, state, frozen, before = single
    jax.tree.map(np.testing.assert_array_equal, mesh.fetch(frozen)["vision"], before)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(arrays) == 4 * len(jax.tree.leaves(before))  # params, average, two moments: students


def test_bfloat16_trains_like_float32_with_float32_state(single):
    half = replace(TASK, dtype="bfloat16", teacher_dtype="bfloat16", remat="names")
    losses, state, _, _ = _train(4, 2, recipe=replace(RECIPE, task=half))
    np.testing.assert_allclose(losses, single[0], atol=0.02)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (np.float32, np.int32)


def test_no_device_works_on_the_whole_batch():
    """Tables are gathered like kernels; their width sharding must not spread to activations."""
    devices, batch = mesh.make_mesh(1, 8), 32
    text = presets.TextSpec(12, 96, 32, 2, 2, 64, 16)
    task = Task("contrastive", VISION, CLIP.mean, CLIP.std, text=text)
    recipe = replace(RECIPE, task=task)
    with jax.set_mesh(devices):
        arrays = {
            "image": np.zeros((batch, 64, 64, 3), np.uint8),
            "text": np.ones((batch, text.context), np.int32),
        }
        placed = jax.device_put(arrays, mesh.batch_sharding(devices))
        step = compile_step(recipe, devices, {})
        hlo = step.lower(init_state(recipe, devices), {}, placed).compile().as_text()
    moved = re.findall(r"= \w+\[(\d+)[^ ]* (?:all-gather|all-reduce|all-to-all)", hlo)
    assert moved  # there are collectives
    assert not {batch * text.context, batch * (1 + VISION.tokens)} & set(map(int, moved))


def test_the_average_follows_the_parameters(single):
    _, state, _, _ = single
    params, ema = (jax.tree.leaves(mesh.fetch(t)) for t in (state.params, state.ema))
    assert any((p != e).any() for p, e in zip(params, ema, strict=True))
    for p, e in zip(params, ema, strict=True):
        np.testing.assert_allclose(p, e, atol=0.02)


def test_masks_differ_between_steps_and_images():
    key = jax.random.key(RECIPE.seed)
    first, second = (
        masking.sample(jax.random.fold_in(key, step), 8, VISION.grid, TASK.mask) for step in (0, 1)
    )
    assert (first != second).any()
    assert (first[0] != first[1]).any()
