"""Numbers that are not finite, and inputs that leave nothing to align: an update does no harm.

Rows of the list of faults: 80.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_state import RECIPE, VISION, on, state_at

from uta_jax import UserError, mesh
from uta_jax import config as configs
from uta_jax.interop.teacher import read_spec
from uta_jax.models.vit import init_vit
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import compile_step

# The counts of state_at are far beyond its own 20 steps, where the rate is 0.
LONG = replace(RECIPE, optim=replace(RECIPE.optim, total_steps=10**6))


@pytest.fixture
def teacher():
    return mesh.fetch(init_vit(VISION, jax.random.key(9)))


def updated(teacher, change=lambda params: params):
    """(state before, state after, metrics) of update 4 from a state whose moments are not zero.

    ``change``: of the parameters before.
    """
    devices = on(1, 1)
    state = state_at(3, devices)
    state = state.replace(params=jax.device_put(change(state.params)))
    frozen = mesh.place(devices, {"vision": teacher})
    image = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    batch = jax.device_put({"image": image}, mesh.batch_sharding(devices))
    # A copy: the update writes into the very memory of the state that it is given.
    before = jax.tree.map(np.array, mesh.fetch(state))
    with jax.set_mesh(devices):
        after, values = compile_step(LONG, devices, frozen)(state, frozen, batch)
    return before, mesh.fetch(after), {name: float(x) for name, x in values.items()}


def assert_left_out(before, after, values):
    """Only the counts have gone on."""
    assert values["bad_step"] == 1 and int(after.step) == int(before.step) + 1
    floats = [
        (np.asarray(old), np.asarray(new))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if jnp.issubdtype(old.dtype, jnp.floating)
    ]
    weights = jax.tree.leaves(before.params)
    assert len(floats) == 4 * len(weights)  # parameters, two moments, average
    for old, new in floats:
        assert old.any() and np.isfinite(old).all()
        assert old.tobytes() == new.tobytes()


def with_head(change):
    """The parameters with the projection's arrays changed."""

    def changed(params):
        head = params["vision"]["head"]
        head = head | {"proj": jax.tree.map(change, head["proj"])}
        return {"vision": params["vision"] | {"head": head}}

    return changed


def test_80_an_update_without_a_fault_changes_parameters_moments_and_average(teacher):
    """What the other tests compare would show a change."""
    before, after, values = updated(teacher)
    assert values["bad_step"] == 0
    pairs = jax.tree.map(lambda old, new: bool((old != new).any()), before, after)
    for tree in (pairs.params, pairs.opt_state, pairs.ema):
        changed = jax.tree.leaves(tree)
        assert sum(changed) > len(changed) / 2  # a bias of keys has no gradient


def test_80_a_gradient_that_alone_is_nan(teacher, monkeypatch):
    """The root of zero is finite, its slope is not."""
    uta = OBJECTIVES["uta"]

    def loss(params, *args):
        value, figures = uta.loss(params, *args)
        zero = sum(leaf.sum() * 0 for leaf in jax.tree.leaves(params["vision"]["head"]["proj"]))
        return value + jnp.sqrt(zero), figures

    monkeypatch.setitem(OBJECTIVES, "uta", replace(uta, loss=loss))
    before, after, values = updated(teacher)
    assert np.isfinite(values["loss"]) and np.isnan(values["grad_norm"])
    wild = [name for name, x in values.items() if "/" in name and not np.isfinite(x)]
    assert wild == ["grad_norm/vision/head/proj"]  # the group is named, and no other
    assert_left_out(before, after, values)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_80_a_teacher_with_one_number_that_is_not_finite(teacher, number):
    kernel = np.array(teacher["head"]["proj"]["kernel"])
    kernel[0, 0] = number
    teacher["head"]["proj"]["kernel"] = kernel
    before, after, values = updated(teacher)
    assert np.isnan(values["loss"])
    assert_left_out(before, after, values)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_80_tokens_of_norm_zero_have_cosine_zero_and_a_finite_gradient(teacher, whose):
    """Every token of one side is the zero vector; the update is a sound one and is made."""
    if whose == "teacher":
        teacher["head"] = jax.tree.map(np.zeros_like, teacher["head"])
        _, after, values = updated(teacher)
        assert values["grad_norm"] == 0
    else:
        _, after, values = updated(teacher, with_head(jnp.zeros_like))
        assert values["grad_norm/vision/head/proj"] > 0
    assert values["loss"] == values["cos_cls"] == values["cos_patch"] == 0
    assert values["bad_step"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(
    "ratio, words",
    [(1.0, "a share in"), (-0.1, "a share in"), (np.nan, "a share in"), (0.999, "keeps 0 of 64")],
)
def test_80_all_tokens_masked_is_refused(ratio, words):
    with pytest.raises(UserError, match=rf"config\.mask\.ratio.*{words}"):
        recipe_with(ratio)


def test_80_nothing_masked_is_a_choice():
    assert recipe_with(0.0).task.mask.keep == 64


def recipe_with(ratio):
    c = configs.default_config()
    c.student.preset, c.teacher.path = "tiny_clip", "asset:tiny_clip"
    c.data.path, c.data.batch_size, c.train.steps, c.mask.ratio = "data", 8, 10, ratio
    configs.check(c)
    return configs.make_recipe(c, read_spec(c.teacher.path), 100)
