"""Where a process was started: which one of how many it is, and where it finds process 0.

``ENVIRONMENTS`` is a table of the schedulers that say so, each by variables of its own. By hand:

    JAX_COORDINATOR_ADDRESS=HOST:PORT   of process 0; the same everywhere
    JAX_NUM_PROCESSES=N JAX_PROCESS_ID=I
    JAX_LOCAL_DEVICE_IDS=0,1            only where processes of one host share its GPUs out
"""

import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from uta_jax import UserError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its run."""

    environment: str
    index: int = 0
    count: int = 1
    coordinator: str = ""  # HOST:PORT of process 0
    local_devices: tuple[int, ...] | None = None  # of this host's GPUs; None: all


def _plain(env: Mapping[str, str]) -> Place | None:
    given = [name for name in BY_HAND if env.get(name)]
    if not given:
        return None
    if len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise UserError(f"{given[0]} is set, but not {missing}: set all of {', '.join(BY_HAND)}")
    local = env.get("JAX_LOCAL_DEVICE_IDS")
    devices = tuple(_whole("JAX_LOCAL_DEVICE_IDS", i) for i in local.split(",")) if local else None
    count, index = _number(env, BY_HAND[1]), _number(env, BY_HAND[2])
    return Place("coordinator", index, count, env[BY_HAND[0]], devices)


def _slurm(env: Mapping[str, str]) -> Place | None:
    """One task a node, or one a GPU; `srun` sets all of it."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return None
    # The same port for all tasks of a job, and most likely another for another job.
    port = env.get("JAX_COORDINATOR_PORT") or 61440 + _number(env, "SLURM_JOB_ID") % 4096
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    tasks_here = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
    own = None
    if len(visible) == _whole("SLURM_STEP_TASKS_PER_NODE", tasks_here) > 1:
        own = (_number(env, "SLURM_LOCALID"),)
    return Place(
        "Slurm",
        _number(env, "SLURM_PROCID"),
        _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"),
        f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        own,
    )


def _first_host(nodes: str) -> str:
    """``node[003,007-9],other`` -> node003."""
    head, bracket, rest = nodes.partition("[")
    if "," in head or not bracket:
        return head.partition(",")[0]
    return head + rest.replace("-", ",").replace("]", ",").partition(",")[0]


def _gke(env: Mapping[str, str]) -> Place | None:
    """What GKE sets in the containers of a TPU slice, and JobSet for several slices."""
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if not workers or "TPU_WORKER_ID" not in env:
        return None
    hosts = [worker.partition(":")[0] for worker in workers.split(",")]
    return _slices("GKE", hosts, _number(env, "TPU_WORKER_ID"), env)


def _tpu_pod(env: Mapping[str, str]) -> Place | None:
    """A slice of TPU VMs, by the metadata server of Google's cloud."""
    if "TPU_SKIP_MDS_QUERY" in env:  # which JAX sets where it finds no TPU chip
        return None
    workers, index = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not workers or not index:
        return None
    # NAME each, or NAME:ID:ADDRESS
    hosts = [worker.split(":")[-1] for worker in workers.split(",")]
    pairs = (line.partition(":")[::2] for line in _metadata("tpu-env").splitlines())
    slices = {key.strip(): value.strip(" '") for key, value in pairs}
    return _slices("TPU pod", hosts, _whole("agent-worker-number", index), slices | dict(env))


def _metadata(key: str) -> str:
    """An attribute of this virtual machine, "" where there is none or this is not Google's."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _slices(name: str, hosts: list[str], worker: int, env: Mapping[str, str]) -> Place:
    """Slice by slice, worker by worker; the first worker of the first slice coordinates."""
    env = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"} | dict(env)
    slices, this = _number(env, "MEGASCALE_NUM_SLICES"), _number(env, "MEGASCALE_SLICE_ID")
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or hosts[0]
    port = env.get("JAX_COORDINATOR_PORT", "8482")
    name = f"{name}, {slices} slices" if slices > 1 else name
    return Place(name, this * len(hosts) + worker, slices * len(hosts), f"{first}:{port}")


def _number(env: Mapping[str, str], name: str) -> int:
    if not env.get(name):
        raise UserError(
            f"{name} is not set, but others that come with it are: start every process by the "
            f"launcher that sets them all, or by hand with {', '.join(BY_HAND)}"
        )
    return _whole(name, env[name])


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value!r} must be a whole number") from None


# The first that recognises its variables counts; what each takes number and count from.
ENVIRONMENTS: tuple[tuple[Callable[[Mapping[str, str]], Place | None], str], ...] = (
    (_plain, "JAX_PROCESS_ID, JAX_NUM_PROCESSES"),
    (_slurm, "SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS"),
    (_gke, "TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, MEGASCALE_SLICE_ID, MEGASCALE_NUM_SLICES"),
    (_tpu_pod, "agent-worker-number, worker-network-endpoints, tpu-env of the metadata server"),
)


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """Which process of how many this is, by ``ENVIRONMENTS``; else the only one.

    Raises UserError for variables that say nothing sensible, or only a part.
    """
    for recognise, variables in ENVIRONMENTS:
        if place := recognise(env):
            if not 0 <= place.index < place.count:
                raise UserError(
                    f"{place.environment}: this would be process {place.index} of {place.count}, "
                    f"whose numbers begin with 0: mend {variables}"
                )
            return place
    return Place("one process")
