"""The device mesh, and the one table that says how every array of a run is laid out on it.

Axes: ``data`` replicates parameters, ``fsdp`` shards them and gathers each layer's where it is
used, ``tensor`` computes each layer in parts: its attention heads and hidden units (Shoeybi et al.
2019, Megatron-LM). The batch is split over the first two. Axes are ``Auto``: the compiler places
every intermediate, which Explicit axes would leave to each matrix product.
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from uta_jax import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
HEADS = ("tensor", "fsdp")  # of attention, where they divide

# Path of a parameter -> its layout; the first match counts and every parameter must match. The same
# rows lay out gradients, moments, EMA and the teacher, whose paths end alike. Of several layouts,
# the first whose axes divide counts. fsdp shards the width: it divides by any sensible number of
# chips, which hidden sizes such as 2730 do not. Of attention's kernels it shards the heads where
# they divide: gathered along the width, the TPU compiler turns each kernel over on v5p, which by
# its estimate takes 5 % of a UTA-g/14 step.
LAYOUT: tuple[tuple[str, P | list[P]], ...] = (
    (  # [L, d, heads, head_dim]
        r"blocks/attn/[qkv]/kernel$",
        [P(None, None, HEADS, None), P(None, "fsdp", "tensor", None)],
    ),
    (r"blocks/attn/[qkv]/bias$", P(None, "tensor", None)),  # [L, heads, head_dim]
    (  # [L, heads, head_dim, d]
        r"blocks/attn/proj/kernel$",
        [P(None, HEADS, None, None), P(None, "tensor", None, "fsdp")],
    ),
    (r"blocks/mlp/(up|gate)/kernel$", P(None, "fsdp", "tensor")),  # [L, d, hidden]
    (r"blocks/mlp/(up|gate)/bias$", P(None, "tensor")),  # [L, hidden]
    (r"blocks/mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, hidden, d]
    (r"blocks/(attn|mlp)/norm/(scale|bias)$", P(None, "tensor")),  # [L, heads x head_dim or hidden]
    (r"pool/attn/[qkv]/kernel$", P("fsdp", None, None)),  # [d, heads, head_dim]
    (r"pool/attn/proj/kernel$", P(None, None, "fsdp")),  # [heads, head_dim, d]
    (r"pool/mlp/up/kernel$", P("fsdp", None)),  # [d, hidden]
    (r"pool/mlp/down/kernel$", P(None, "fsdp")),  # [hidden, d]
    (r"(patch_embed/kernel|pos_embed|token_embed/embedding)$", P(None, "fsdp")),  # [rows, d]
    (r"head/proj/kernel$", P("fsdp", None)),  # [d, e]
    (r"decoder/kernel$", P(None, "fsdp", None)),  # [targets, d, t]
    (r"(bias|scale|layer_scale[12]|cls_token|mask_token|probe|mix|logit_scale|count)$", P()),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn_data: int = 0,
    devices: list | None = None,
) -> Mesh:
    """A ``data`` x ``fsdp`` x ``tensor`` mesh over ``devices`` (default: all).

    One of the sizes may be -1: what the others leave. ``dcn_data`` is the part of ``data`` that
    goes over the slow network, between slices: their number, or that of the processes where each
    shall count as one; 0: as many as the devices say they form. The other axes stay within one; 1
    lets them go over the slow network as well.

    Raises UserError where the sizes do not multiply to the number of devices, or an axis does not
    fit within a slice, or ``tensor`` within a process.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(data, fsdp, tensor, len(devices))
    grid = _grid(shape, dcn_data, devices)
    for row in grid.reshape(-1, shape[2]):
        if len({d.process_index for d in row}) > 1:  # their images would have to be alike
            raise UserError(
                f"mesh.tensor={shape[2]} reaches over processes, which read images of their own: "
                f"choose at most the {_own(devices)} devices of one"
            )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The axes of a mesh of so many devices, -1 filled in; UserError where they do not multiply."""
    wanted = data, fsdp, tensor
    rest = math.prod(size for size in wanted if size != -1)
    fill = devices // max(rest, 1) if wanted.count(-1) == 1 else -1
    shape = tuple(fill if size == -1 else size for size in wanted)
    if min(shape) < 1 or math.prod(shape) != devices:
        axes = " x ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
        raise UserError(
            f"{axes} must multiply to the {devices} devices present (one of them may be -1: "
            "whatever the others leave)"
        )
    return shape


def _own(devices: list) -> int:
    """How many of ``devices`` a process has."""
    return len(devices) // _counts(devices)[1]


def _counts(devices: list) -> tuple[int, int]:
    """How many slices (TPU) or hosts (GPU) the devices say they form, and how many processes."""
    slices = {getattr(d, "slice_index", 0) for d in devices}
    return len(slices), len({d.process_index for d in devices})


def _grid(shape: tuple[int, ...], dcn_data: int, devices: list) -> np.ndarray:
    """The devices, one part of the slow network after the other along the data axis.

    An axis may take a part of a torus' side (fsdp 16 of 8 x 8 chips).
    """
    slices, processes = _counts(devices)
    parts = dcn_data or slices
    if parts not in (1, slices, processes):
        raise UserError(
            f"mesh.dcn_data={parts}, but the devices form {slices} slices, of {processes} "
            "processes: choose one of these numbers, 1, or 0 for that of the slices"
        )
    if parts == slices == 1:
        return create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if parts == 1:
        inner = sorted(devices, key=lambda d: (d.slice_index, d.process_index, d.id))
        return np.array(inner, object).reshape(shape)
    data, *inner = shape
    if data % parts:
        kind, each = "slices" if parts == slices else "processes", len(devices) // parts
        raise UserError(
            f"mesh.fsdp={inner[0]} x mesh.tensor={inner[1]} does not fit within each of the "
            f"{parts} {kind} of {each} devices: choose a product that divides {each}, or "
            "mesh.dcn_data=1 to gather parameters over the slow network"
        )
    return create_hybrid_device_mesh(
        (data // parts, *inner),
        (parts, 1, 1),
        devices,
        process_is_granule=parts != slices,
        allow_split_physical_axes=True,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices that compute different images."""
    return NamedSharding(mesh, P(BATCH))


def batch_parts() -> int:
    """Into how many the batch is split by the mesh that is set; 1 where there is none."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in BATCH)


def device_kind() -> str:
    """Of the mesh that is set, as ``TPU v5 lite``; "" where there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


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


def layout(tree, sizes: Mapping[str, int]):
    """The tree of PartitionSpecs that ``LAYOUT`` gives arrays or ShapeDtypeStructs.

    ``sizes``: of the mesh's axes. Raises UserError for a parameter that no row covers or whose
    sharded axis does not divide.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(path_name(path), leaf.shape, sizes), tree
    )


def _spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    specs = first_match(LAYOUT, name, "sharding")
    specs = specs if isinstance(specs, list) else [specs]
    uneven: list[tuple[str, int]] = []
    for spec in specs:
        uneven = [
            (names, axis) for axis, names in enumerate(spec) if shape[axis] % _parts(names, sizes)
        ]
        if not uneven:
            return spec
    mesh_axis, axis = uneven[0]
    raise UserError(
        f"mesh.{mesh_axis}={sizes[mesh_axis]} does not divide axis {axis} ({shape[axis]}) of "
        f"parameter {name!r}: choose a divisor"
    )


def _parts(names: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Into how many an axis is split by what a PartitionSpec has for it."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sizes[name] for name in names if name)


def constrain(tree):
    """Parameters or gradients within a compiled function, laid out by ``LAYOUT`` from here on."""
    if (mesh := jax.sharding.get_abstract_mesh()).empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout(tree, mesh.shape))


def shardings(mesh: Mesh, tree):
    """``layout`` as NamedShardings on ``mesh``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout(tree, mesh.shape))


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


def gather(x: jax.Array, name: str = "") -> jax.Array:
    """Ask for the whole of a sharded parameter, here, once; of a block's, a part over ``tensor``.

    ``name``: its path, or "" where no axis but fsdp shards it. A layer's parameter has lost the
    leading axis by which ``LAYOUT`` lays it out.

    Left alone, the partitioner may turn each product with a sharded kernel into a ring of partial
    products, which the TPU compiler's own model puts at 2.9 times the cycles of gathering first.
    Its transpose asks the same of the gradient, which so crosses devices in the compute dtype.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    specs = first_match(LAYOUT, name, "sharding") if name else P()
    spec = specs[-1] if isinstance(specs, list) else specs  # the last has the axes one by one
    return jax.lax.with_sharding_constraint(
        x, P(*(None if axis == "fsdp" else axis for axis in spec[-x.ndim :]))
    )


def fetch(tree):
    """Device arrays -> NumPy, whole, whatever their layout; with several processes, all must."""
    return jax.tree.map(_whole, tree)


def _whole(x) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return np.asarray(jax.device_get(x))
