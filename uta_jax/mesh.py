"""The device mesh, and the one table that says how every array of a run is laid out on it.

Axes: ``data`` replicates parameters, ``fsdp`` shards them; the batch is split over both. Axes are
``Auto``: the compiler places every intermediate, which Explicit axes would leave to each matrix
product.
"""

import ctypes
import os
import re

import jax
import numpy as np
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


def start_up() -> None:
    """Settle what has to be settled before the first array; for the whole process.

    Several devices made of one CPU run their programs one by one: with programs in flight, a
    collective can wait for a thread that the next program holds, and XLA ends the process.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """On CPU, let the C allocator keep what XLA frees after each step; elsewhere, do nothing.

    glibc hands large blocks back to the kernel and the next step faults every page in again, which
    costs small models more than their arithmetic does.
    """
    if jax.default_backend() != "cpu" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        libc.mallopt(option, value)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A ``data`` x ``fsdp`` mesh over ``devices`` (default: all); -1 takes what the other leaves.

    Raises UserError where the product is not the number of devices, or there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: runs of one process only, for now")
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
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


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
    """Host arrays -> device arrays laid out by ``LAYOUT``."""
    return jax.tree.map(jax.device_put, params, shardings(mesh, params))


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
    """Device arrays -> NumPy, whole, whatever their layout."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
