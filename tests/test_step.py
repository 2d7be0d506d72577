"""The sharded step: the same numbers on every mesh, really sharded, and nothing moved in vain."""

import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from alike import BATCH, CLIP, QUICK, RECIPE, STUDENT, TASK, TEACHER, teacher, train
from several import Job

from uta_jax import hlo, masking, mesh
from uta_jax.models import presets
from uta_jax.objectives import Task
from uta_jax.step import compile_step, param_shapes, state_shapes

# What is compared with one device: the mesh, and the parts that each batch is computed in.
MESHES = {
    "data 2": ((2, 1, 1), 1),
    "data 4 x fsdp 2": ((4, 2, 1), 1),
    "data 8": ((8, 1, 1), 1),
    "fsdp 8": ((1, 8, 1), 1),
    "data 4 x tensor 2": ((4, 1, 2), 1),
    "data 2 x fsdp 2, accumulate 4": ((2, 2, 1), 4),
}


def _on(*shape: int) -> jax.sharding.Mesh:
    return mesh.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


@pytest.fixture(scope="module")
def single():
    return train(_on(1, 1, 1))


@pytest.fixture(scope="module")
def runs():
    """The run on each mesh of ``MESHES``, when it is first asked for."""
    done = {}

    def run(name):
        if name not in done:
            shape, parts = MESHES[name]
            done[name] = train(_on(*shape), replace(RECIPE, accumulate=parts))
        return done[name]

    return run


def _assert_alike(losses, params, single):
    np.testing.assert_allclose(losses, single[0], atol=1e-5)
    assert losses[-1] < losses[0] - 0.01  # it is training, not standing still
    for a, b in zip(params, jax.tree.leaves(mesh.fetch(single[1].params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", MESHES)
def test_the_mesh_does_not_change_the_losses(single, runs, name):
    losses, state, *_ = runs(name)
    _assert_alike(losses, jax.tree.leaves(mesh.fetch(state.params)), single)


@pytest.mark.slow
def test_two_processes_train_alike(single, tmp_path):
    """Of four devices each: data 2 over the processes, fsdp 2 and tensor 2 within."""
    with Job(tmp_path / "two", "tests/alike.py", f"{tmp_path}/found.npz", devices=4) as job:
        assert job.codes() == [0, 0], job.all()
    with np.load(tmp_path / "found.npz") as found:
        params = [found[f"params/{i}"] for i in range(len(found.files) - 1)]
        _assert_alike(found["losses"], params, single)


@pytest.mark.parametrize("name", MESHES)
def test_only_parameters_are_gathered(runs, single, name):
    """Every all-gather has the size of one layer's parameter, or of its part over tensor."""
    tensor, sizes = MESHES[name][0][2], set()
    for path, leaf in jax.tree.leaves_with_path((single[1].params, single[2])):
        layers = leaf.shape[0] if "blocks" in (where := mesh.path_name(path)) else 1
        spec = mesh.layout({where: leaf}, dict.fromkeys(mesh.AXES, 1))[where]
        parts = tensor if "tensor" in str(spec) else 1
        sizes.add(leaf.nbytes // layers // parts)
    gathered = set(hlo.results(runs(name)[3], "all-gather"))
    assert gathered <= sizes
    assert bool(gathered) == ("fsdp" in name)


def test_the_table_splits_every_part_of_the_state(runs):
    _, state, frozen, _ = runs("fsdp 8")
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for tree in (state.params, state.ema, adam.mu, adam.nu, frozen):
        kernel = tree["vision"]["blocks"]["mlp"]["up"]["kernel"]
        layers, width, hidden = kernel.shape
        assert {s.data.shape for s in kernel.addressable_shards} == {(layers, width // 8, hidden)}
        assert len({s.device for s in kernel.addressable_shards}) == 8
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    first = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert first < 0.25 * whole  # an eighth, and the small vectors whole


def _is_adam(node) -> bool:
    return hasattr(node, "mu")


def test_the_teacher_is_bitwise_unchanged_and_nowhere_in_the_state(single):
    _, state, frozen, _ = single
    jax.tree.map(np.testing.assert_array_equal, mesh.fetch(frozen["vision"]), teacher())
    arrays = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    students = 4 * [leaf.shape for leaf in jax.tree.leaves(param_shapes(TASK))]
    assert sorted(arrays) == sorted(students)  # parameters, average, two moments


def test_bfloat16_trains_like_float32_with_float32_state(single):
    half = replace(TASK, dtype="bfloat16", teacher_dtype="bfloat16", remat="names")
    losses, state, *_ = train(_on(2, 2, 2), replace(RECIPE, task=half))
    np.testing.assert_allclose(losses, single[0], atol=0.02)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (np.float32, np.int32)


def test_no_device_works_on_the_whole_batch():
    """Tables are gathered like kernels; their width sharding must not spread to activations."""
    devices, batch = mesh.make_mesh(1, 8), 2 * BATCH
    vision, text = (
        replace(TEACHER, width=32, depth=1),
        presets.TextSpec(12, 96, 32, 1, 2, 64, TEACHER.out_dim),
    )
    recipe = replace(RECIPE, task=Task("contrastive", vision, CLIP.mean, CLIP.std, text=text))
    split = mesh.batch_sharding(devices)
    arrays = {
        "image": jax.ShapeDtypeStruct((batch, 32, 32, 3), np.uint8, sharding=split),
        "text": jax.ShapeDtypeStruct((batch, text.context), np.int32, sharding=split),
    }
    with jax.set_mesh(devices):
        lowered = compile_step(recipe, devices, {}).lower(state_shapes(recipe), {}, arrays)
    program = lowered.compile(QUICK).as_text()
    moved = re.findall(r"= \w+\[(\d+)[^ ]* (?:all-gather|all-reduce|all-to-all)", program)
    assert moved  # there are collectives
    assert not {batch * text.context, batch * (1 + vision.tokens)} & set(map(int, moved))


def test_the_average_follows_the_parameters(single):
    _, state, *_ = single
    params, ema = (jax.tree.leaves(mesh.fetch(t)) for t in (state.params, state.ema))
    assert any((p != e).any() for p, e in zip(params, ema, strict=True))
    for p, e in zip(params, ema, strict=True):
        np.testing.assert_allclose(p, e, atol=0.04)


def test_masks_differ_between_steps_and_images():
    key = jax.random.key(RECIPE.seed)
    first, second = (
        masking.sample(jax.random.fold_in(key, step), 8, STUDENT.grid, TASK.mask) for step in (0, 1)
    )
    assert (first != second).any()
    assert (first[0] != first[1]).any()
