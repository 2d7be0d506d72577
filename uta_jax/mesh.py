"""The device mesh, and the one table that says how every array of a run is laid out on it.

Axes: ``data`` replicates parameters, ``fsdp`` shards them; the batch is split over both. Axes are
``Auto``: the compiler places every intermediate, which Explicit axes would leave to each matrix
product.
"""

import re

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from uta_jax import UserError

AXES = ("data", "fsdp")

# Path of a parameter -> its layout; the first match counts and every parameter must match. The same
# rows lay out gradients, moments, EMA and the teacher, whose paths end alike. Only the width axis
# is sharded: it divides by any sensible number of chips, which hidden sizes such as 2730 do not.
LAYOUT: tuple[tuple[str, P], ...] = (
    (r"blocks/attn/[qkv]/kernel$", P(None, "fsdp", None, None)),  # [L, d, heads, head_dim]
    (r"blocks/attn/proj/kernel$", P(None, None, None, "fsdp")),  # [L, heads, head_dim, d]
    (r"blocks/mlp/(up|gate)/kernel$", P(None, "fsdp", None)),  # [L, d, hidden]
    (r"blocks/mlp/down/kernel$", P(None, None, "fsdp")),  # [L, hidden, d]
    (r"pool/attn/[qkv]/kernel$", P("fsdp", None, None)),  # [d, heads, head_dim]
    (r"pool/attn/proj/kernel$", P(None, None, "fsdp")),  # [heads, head_dim, d]
    (r"pool/mlp/up/kernel$", P("fsdp", None)),  # [d, hidden]
    (r"pool/mlp/down/kernel$", P(None, "fsdp")),  # [hidden, d]
    (r"(patch_embed/kernel|pos_embed|token_embed/embedding)$", P(None, "fsdp")),  # [rows, d]
    (r"head/proj/kernel$", P("fsdp", None)),  # [d, e]
    (r"decoder/kernel$", P(None, "fsdp", None)),  # [targets, d, t]
    (r"(bias|scale|layer_scale[12]|cls_token|mask_token|probe|mix|logit_scale|count)$", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A ``data`` x ``fsdp`` mesh over ``devices`` (default: all); -1 takes what the other leaves.

    Raises UserError where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp]
    if data == -1:
        sizes[0] = len(devices) // max(fsdp, 1)
    elif fsdp == -1:
        sizes[1] = len(devices) // max(data, 1)
    if min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} must multiply to the {len(devices)} devices "
            "present (one of them may be -1: whatever the other leaves)"
        )
    # An axis may take a part of a torus' side (fsdp 16 of 8 x 8 chips), as jax.make_mesh has it for
    # v5e alone.
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over every device."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def path_name(path: tuple) -> str:
    """A pytree key path as ``vision/blocks/norm1/scale``: the form that all tables match."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(table: tuple, name: str, purpose: str):
    """The value of the first row of ``table`` whose pattern is found in ``name``."""
    for pattern, value in table:
        if re.search(pattern, name):
            return value
    raise UserError(f"no row of the {purpose} table covers parameter {name!r}: add one")


def shardings(mesh: Mesh, tree):
    """The tree of NamedShardings that ``LAYOUT`` gives a tree of arrays or ShapeDtypeStructs.

    Raises UserError for a parameter that no row covers or whose sharded axis does not divide.
    """

    def one(path, leaf):
        name = path_name(path)
        spec = first_match(LAYOUT, name, "sharding")
        for axis, mesh_axis in enumerate(spec):
            if mesh_axis and leaf.shape[axis] % mesh.shape[mesh_axis]:
                raise UserError(
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide axis {axis} "
                    f"({leaf.shape[axis]}) of parameter {name!r}: choose a divisor"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(mesh: Mesh, params):
    """Host arrays, the same on every process -> device arrays laid out by ``LAYOUT``."""
    return jax.tree.map(_put, params, shardings(mesh, params))


def replicate(mesh: Mesh, tree):
    """Host arrays, the same on every process -> whole copies on every device."""
    return jax.tree.map(lambda x: _put(x, replicated(mesh)), tree)


def _put(x, sharding: NamedSharding) -> jax.Array:
    """``device_put`` without its comparison over processes, which would move every parameter."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def gather(x: jax.Array) -> jax.Array:
    """Ask for the whole of a sharded parameter, here, once.

    Left alone, the partitioner may turn each product with a sharded kernel into a ring of partial
    products, which the TPU compiler's own model puts at 2.9 times the cycles of gathering first.
    Its transpose asks the same of the gradient, which so crosses devices in the compute dtype.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())


def fetch(tree):
    """Device arrays -> NumPy, whole, whatever their layout; with several processes, all must."""
    return jax.tree.map(_whole, tree)


def _whole(x) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return np.asarray(jax.device_get(x))
