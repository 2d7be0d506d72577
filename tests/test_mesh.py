"""The layout table: it covers every model there is, and what it says really happens on devices."""

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
    """All but the vectors is split over fsdp, along an axis that is the model's width."""
    spec, init = TOWERS[name]
    tree = shapes(spec, init)
    layout = mesh.shardings(fsdp(8), tree)
    whole = 0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True):
        if "fsdp" in sharding.spec:
            assert leaf.shape[sharding.spec.index("fsdp")] == spec.width
            assert sharding.shard_shape(leaf.shape) != leaf.shape
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
        share = size if "fsdp" in spec else 1
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
    "data, size, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (4, 2, (4, 2))]
)
def test_mesh_sizes(data, size, shape):
    grid = mesh.make_mesh(data, size)
    assert tuple(grid.shape.values()) == shape and grid.axis_names == ("data", "fsdp")
    assert sorted(d.id for d in grid.devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [(3, 1), (-1, -1), (-1, 3), (-1, 16), (0, 8), (-1, 0), (-2, -4)])
def test_impossible_mesh_sizes(sizes):
    with pytest.raises(UserError, match=rf"mesh\.data={sizes[0]} x mesh\.fsdp={sizes[1]} .* 8 dev"):
        mesh.make_mesh(*sizes)


def test_a_mesh_over_some_of_the_devices():
    assert mesh.make_mesh(devices=jax.devices()[:2]).shape == {"data": 2, "fsdp": 1}


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


def test_gather_without_a_mesh_is_nothing():
    x = jax.numpy.ones(3)
    assert mesh.gather(x) is x
