"""Accelerators by name, and the devices of a slice or node that need not exist."""

import os
import re
from dataclasses import dataclass

import jax

from uta_jax import UserError, quiet_tpu_library


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip, from the maker's data sheets, without sparsity."""

    flops: float  # bf16, per second
    bandwidth: float  # bytes of its memory per second
    memory: float  # bytes that a program can use: of a TPU, what its compiler says
    clock: float = 0.0  # cycles per second of the matrix units, as the peak has it; 0: a GPU
    shapes: tuple[str, ...] = ()  # of its slices


_GIB = 2.0**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8")
    + ("8x8x12", "8x8x16", "8x12x12", "8x12x16", "8x16x16", "12x12x12", "12x12x16", "12x16x16")
    + ("16x16x16", "16x16x24")
)
TPUS = {
    "v5e": Chip(197e12, 819e9, 15.75 * _GIB, 1.503e9, _FLAT),
    "v5p": Chip(459e12, 2765e9, 95.73 * _GIB, 1.75e9, _CUBES),
    "v6e": Chip(918e12, 1640e9, 31.24 * _GIB, 1.75e9, _FLAT),
}
GPUS = {
    "a100": Chip(312e12, 2039e9, 80e9),
    "h100": Chip(989e12, 3350e9, 80e9),
    "h200": Chip(989e12, 4800e9, 141e9),
    "b200": Chip(2250e12, 7700e9, 180e9),
    "l4": Chip(121e12, 300e9, 24e9),
}
_HOST = re.compile(rf"(?:cpu:|gpu:({'|'.join(GPUS)})x)([1-9]\d*)")


def known() -> str:
    """Every topology there is, for people."""
    slices = {}
    for kind, chip in TPUS.items():
        slices.setdefault(chip.shapes, []).append(kind)
    rows = [
        f"{' or '.join(kinds)}:SHAPE of {', '.join(shapes)}" for shapes, kinds in slices.items()
    ]
    return "; ".join([*rows, f"gpu:KINDxN with KIND of {', '.join(GPUS)}; cpu:N"])


def chip_of(topology: str) -> Chip | None:
    """The chip that a topology is made of; None: CPUs, of which there is no data sheet."""
    kind, _, rest = topology.partition(":")
    return GPUS[rest.split("x")[0]] if kind == "gpu" else TPUS.get(kind)


def host_count(topology: str) -> int:
    """How many devices a topology has, of those that the CPU stands in for; 0: a TPU's, or none."""
    found = _HOST.fullmatch(topology)
    return int(found.group(2)) if found else 0


def devices(topology: str) -> list:
    """The devices of "v5e:4x4", "gpu:h100x8" or "cpu:8"; a GPU's are CPU devices in its place.

    Raises UserError for an unknown topology, with all that are known.
    """
    if count := host_count(topology):
        return _host_devices(topology, count)
    kind, _, shape = topology.partition(":")
    if kind not in TPUS or shape not in TPUS[kind].shapes:
        raise UserError(f"--topology={topology}: not known; there are {known()}")
    return _slice(topology)


def _host_devices(topology: str, count: int) -> list:
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"--topology={topology}: this process has {len(found)} CPU devices, as XLA_FLAGS says: "
            "unset it, or plan for fewer"
        )
    return found[:count]


def _slice(topology: str) -> list:
    from jax.experimental import topologies

    # It asks the metadata server of a TPU machine, and locks the library against a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    quiet_tpu_library()
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # an untyped error of the plugin's
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={topology}: the TPU compiler is not to be had ({reason}): "
            "`pip install 'uta-jax[tpu]'`"
        ) from None
