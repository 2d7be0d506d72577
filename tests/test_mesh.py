"""The layout table: it covers every model there is, and what it says really happens on devices."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from uta_jax import UserError, mesh
from uta_jax.models.presets import CLIP, VIT, VitSpec
from uta_jax.models.text import init_text
from uta_jax.models.vit import init_vit
from uta_jax.optimizer import AdamW, make_optimizer

KEY = jax.random.key(0)
TOWERS = {
    **{f"vision of {name}": (spec, init_vit) for name, spec in VIT.items()},
    **{f"text of {name}": (spec.text, init_text) for name, spec in CLIP.items()},
}


def shapes(spec, init):
    return jax.eval_shape(lambda: init(spec, KEY))


@pytest.fixture(scope="module")
def tiny():
    """Parameters of the student that has every trait, each leaf with numbers of its own."""
    rng = np.random.default_rng(0)
    tree = shapes(VIT["uta_tiny"], init_vit)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def fsdp(size):
    return mesh.make_mesh(8 // size, size)


@pytest.mark.parametrize("name", TOWERS)
def test_every_preset_is_covered_and_its_bulk_is_sharded(name):
    """All but the vectors is split over fsdp, along the model's width or its heads."""
    spec, init = TOWERS[name]
    tree = shapes(spec, init)
    layout = mesh.shardings(fsdp(8), tree)
    whole = 0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True):
        split = [axis for axis, names in enumerate(sharding.spec) if "fsdp" in str(names)]
        if split:
            assert leaf.shape[split[0]] in (spec.width, spec.heads)
            assert sharding.shard_shape(leaf.shape)[split[0]] == leaf.shape[split[0]] // 8
        else:
            whole += leaf.size
    assert whole < 0.02 * sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["uta_tiny", "tiny_clip", "uta_g14_336"])
def test_moments_lie_as_their_parameters_do(name):
    tree = shapes(VIT[name], init_vit)
    state = jax.eval_shape(make_optimizer(AdamW(1e-3, 10, clip_norm=1.0)).init, tree)
    specs = mesh.shardings(fsdp(8), tree)
    found = mesh.shardings(fsdp(8), state)
    adam = next(part for part in jax.tree.leaves(found, is_leaf=is_adam) if is_adam(part))
    assert adam.mu == specs and adam.nu == specs
    counts = [s for s in jax.tree.leaves(found) if s.spec == P()]
    assert counts, "the step counts are replicated"


def is_adam(node):
    return hasattr(node, "mu")


def test_a_parameter_without_a_row_is_an_error():
    tree = {"vision": {"blocks": {"attn": {"relative_table": np.zeros((4, 4))}}}}
    with pytest.raises(UserError, match="vision/blocks/attn/relative_table"):
        mesh.shardings(fsdp(8), tree)


def test_an_axis_that_does_not_divide_is_named():
    spec = VitSpec(32, 8, width=12, depth=2, heads=2, mlp_hidden=16, out_dim=8)
    with pytest.raises(UserError, match=r"mesh\.fsdp=8 .*axis \d \(12\) of parameter '.*kernel'"):
        mesh.shardings(fsdp(8), shapes(spec, init_vit))
    mesh.shardings(fsdp(4), shapes(spec, init_vit))  # 4 divides 12


@pytest.mark.parametrize("size", [1, 2, 8])
def test_placed_parameters_are_really_split(tiny, size):
    """Each device holds 1 / fsdp of every sharded leaf, and together they hold every number."""
    grid = fsdp(size)
    placed = mesh.place(grid, tiny)
    for path, leaf in jax.tree.leaves_with_path(placed):
        spec = leaf.sharding.spec
        share = size if "fsdp" in str(spec) else 1
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.size * share == leaf.size, mesh.path_name(path)
        split = {str(shard.index) for shard in leaf.addressable_shards}
        assert len(split) == share
    jax.tree.map(np.testing.assert_array_equal, mesh.fetch(placed), tiny)


def test_first_match_wins():
    table = ((r"a/b$", 1), (r"b$", 2))
    assert [mesh.first_match(table, name, "test") for name in ("x/a/b", "x/b")] == [1, 2]
    with pytest.raises(UserError, match="test table covers parameter 'x/c'"):
        mesh.first_match(table, "x/c", "test")


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((-1,), (8, 1, 1)),
        ((-1, 4), (2, 4, 1)),
        ((2, -1), (2, 4, 1)),
        ((4, 2), (4, 2, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 2, -1), (1, 2, 4)),
    ],
)
def test_mesh_sizes(sizes, shape):
    grid = mesh.make_mesh(*sizes)
    assert tuple(grid.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert sorted(d.id for d in grid.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    "sizes",
    [(3, 1), (-1, -1), (-1, 3), (-1, 16), (0, 8), (-1, 0), (-2, -4), (-1, 1, 3), (8, 1, 0)],
)
def test_impossible_mesh_sizes(sizes):
    named = rf"mesh\.data={sizes[0]} x mesh\.fsdp={sizes[1]} x mesh\.tensor=.* 8 dev"
    with pytest.raises(UserError, match=named):
        mesh.make_mesh(*sizes)


def test_a_mesh_over_some_of_the_devices():
    two = mesh.make_mesh(devices=jax.devices()[:2])
    assert two.shape == {"data": 2, "fsdp": 1, "tensor": 1}


@dataclass(frozen=True)
class Far:
    """A device of a slice, as TPUs and GPUs describe themselves."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "none"


def far(slices: int, processes: int, each: int) -> list[Far]:
    """So many slices of so many processes of so many devices, dealt out in no good order."""
    count = slices * processes * each
    own = [Far(i, i // each, i // (processes * each)) for i in range(count)]
    return own[::2] + own[1::2]


def test_only_the_data_axis_goes_over_the_slow_network():
    grid = mesh.make_mesh(-1, 2, 2, devices=far(2, 2, 4)).devices
    assert grid.shape == (4, 2, 2)
    for i, inner in enumerate(grid):
        assert {d.slice_index for d in inner.flat} == {i // 2}
    assert {d.id for d in grid.flat} == set(range(16))
    assert len({d.process_index for d in grid[0].flat}) == 1  # tensor and fsdp are nearest


def test_processes_may_count_as_slices():
    grid = mesh.make_mesh(4, 4, 1, dcn_data=4, devices=far(1, 4, 4)).devices
    assert all({d.process_index for d in row.flat} == {i} for i, row in enumerate(grid))


def test_parameters_may_be_sharded_over_the_slow_network():
    grid = mesh.make_mesh(1, 16, dcn_data=1, devices=far(2, 2, 4)).devices
    assert [d.id for d in grid.flat] == list(range(16))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"dcn_data": 3}, "mesh.dcn_data=3, but the devices form 2 slices, of 4 processes"),
        ({"dcn_data": -2}, "mesh.dcn_data=-2, but the devices form 2 slices"),
        ({"fsdp": 16}, r"mesh.fsdp=16 x mesh.tensor=1 does not fit within .* 2 slices of 8 dev"),
        ({"fsdp": 8, "dcn_data": 4}, "does not fit within each of the 4 processes of 4 devices"),
        ({"tensor": 8}, "mesh.tensor=8 reaches over processes.* at most the 4 devices of one"),
    ],
)
def test_what_does_not_fit_within_a_slice(keys, message):
    with pytest.raises(UserError, match=message):
        mesh.make_mesh(**keys, devices=far(2, 2, 4))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_batch_is_split_over_every_device(size):
    batch = np.arange(16 * 3).reshape(16, 3)
    placed = jax.device_put(batch, mesh.batch_sharding(fsdp(size)))
    rows = sorted(tuple(shard.data[:, 0].tolist()) for shard in placed.addressable_shards)
    assert rows == sorted((batch[i, 0], batch[i + 1, 0]) for i in range(0, 16, 2))


def test_gather_gives_every_device_the_whole():
    kernel = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    grid = fsdp(8)
    with jax.set_mesh(grid):
        split = jax.device_put(kernel, jax.NamedSharding(grid, P("fsdp", None)))
        whole = jax.jit(mesh.gather)(split)
    assert split.addressable_shards[0].data.shape == (1, 8)
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, kernel)


def test_gather_leaves_a_block_split_over_tensor():
    grid = mesh.make_mesh(2, 2, 2)
    kernel = np.arange(8 * 2 * 3, dtype=np.float32).reshape(8, 2, 3)  # [d, heads, head_dim]
    with jax.set_mesh(grid):
        split = jax.device_put(kernel, jax.NamedSharding(grid, P("fsdp", "tensor", None)))
        part = jax.jit(lambda x: mesh.gather(x, "blocks/attn/q/kernel"))(split)
    assert split.addressable_shards[0].data.shape == (4, 1, 3)
    assert {s.data.shape for s in part.addressable_shards} == {(8, 1, 3)}
    np.testing.assert_array_equal(part, kernel)


def test_gather_without_a_mesh_is_nothing():
    x = jax.numpy.ones(3)
    assert mesh.gather(x) is x
