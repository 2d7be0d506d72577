"""Which process of how many this is, by what each kind of launcher sets."""

import re

import pytest

from uta_jax import UserError, places
from uta_jax.places import Place, find_place

HAND = {
    "JAX_COORDINATOR_ADDRESS": "h0:123", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[003,007-9],other", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "job-0.job,job-1.job"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
NOT_GOOGLE = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.fixture
def metadata(monkeypatch):
    """What the metadata server of Google's cloud answers; nothing on other machines."""
    answers = {}
    monkeypatch.setattr(places, "_metadata", lambda key: answers.get(key, ""))
    return answers


def test_without_a_launcher_there_is_one_process(metadata):
    assert find_place({}) == find_place(NOT_GOOGLE) == Place("one process")


def test_by_hand():
    assert find_place(HAND) == Place("coordinator", 2, 3, "h0:123")
    shared = HAND | {"JAX_LOCAL_DEVICE_IDS": "4,5"}
    assert find_place(shared).local_devices == (4, 5)


def test_what_is_said_by_hand_goes_first():
    assert find_place(GKE | SLURM | HAND).count == 3
    alone = HAND | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert find_place(SLURM | alone).count == 1


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node[003,007-9],other", "node003"), ("node[12-15]", "node12"), ("a,b[1-2]", "a"),
        ("gpu-7", "gpu-7"),
    ],
)  # fmt: skip
def test_slurm_coordinates_on_the_first_node_of_the_step(nodes, first):
    place = find_place(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place == Place(
        "Slurm", 5, 8, f"{first}:61441"
    )  # the port is of the job: 61440 + 4097 % 4096
    port = find_place(SLURM | {"JAX_COORDINATOR_PORT": "77"}).coordinator
    assert port.endswith(":77")


@pytest.mark.parametrize(
    "visible, tasks, own", [("0,1,2,3", "4(x2)", (1,)), ("0", "4(x2)", None), ("0,1", "1", None)]
)
def test_slurm_tasks_that_see_every_gpu_take_one_each(visible, tasks, own):
    env = SLURM | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert find_place(env).local_devices == own


def test_outside_of_a_step_slurm_says_nothing():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_place(batch | NOT_GOOGLE).count == 1


def test_gke_and_its_slices():
    assert find_place(GKE) == Place("GKE", 1, 2, "job-0.job:8482")
    several = find_place(GKE | SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": "first.job:9"})
    assert several == Place("GKE, 3 slices", 5, 6, "first.job:8482")
    ports = GKE | {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}
    assert find_place(ports).coordinator == "a:8482"


def test_a_tpu_pod_by_its_metadata(metadata):
    metadata |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "u:1:10.0.0.2,u:2:10.0.0.3",
    }
    assert find_place({}) == Place("TPU pod", 1, 2, "10.0.0.2:8482")
    metadata["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert find_place({}) == Place("TPU pod, 2 slices", 3, 4, "10.0.0.2:8482")
    assert find_place(NOT_GOOGLE).count == 1


@pytest.mark.parametrize(
    "env, words",
    [
        (HAND | {"JAX_PROCESS_ID": "3"}, r"process 3 of 3, .*JAX_PROCESS_ID, JAX_NUM_PROC"),
        (HAND | {"JAX_PROCESS_ID": "-1"}, r"process -1 of 3.*JAX_PROCESS_ID"),
        (HAND | {"JAX_NUM_PROCESSES": "0"}, r"of 0, .*JAX_NUM_PROCESSES"),
        (HAND | {"JAX_PROCESS_ID": "two"}, r"JAX_PROCESS_ID='two' must be a whole number"),
        (HAND | {"JAX_PROCESS_ID": ""}, r"JAX_COORDINATOR_ADDRESS is set, but not JAX_PROCESS_ID"),
        (HAND | {"JAX_LOCAL_DEVICE_IDS": "0;1"}, r"JAX_LOCAL_DEVICE_IDS='0;1' must be"),
        (SLURM | {"SLURM_JOB_ID": ""}, r"SLURM_JOB_ID is not set, but others .*JAX_PROCESS_ID"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "5"}, r"Slurm: .*process 5 of 5.*SLURM_PROCID"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, r"SLURM_STEP_TASKS_PER_NODE='x' must"),
        (GKE | {"TPU_WORKER_ID": "2"}, r"GKE: .*process 2 of 2.*TPU_WORKER_ID, TPU_WORKER_HOST"),
        (GKE | {"TPU_WORKER_ID": ""}, r"TPU_WORKER_ID is not set"),
        (GKE | SLICES | {"MEGASCALE_SLICE_ID": "3"}, r"process 7 of 6.*MEGASCALE_SLICE_ID"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_that_names_the_variable(env, words):
    with pytest.raises(UserError, match=words) as refused:
        find_place(env)
    assert "\n" not in str(refused.value)


def test_slurm_without_a_count_of_tasks():
    env = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert find_place(env | {"SLURM_NTASKS": "6"}).count == 6
    with pytest.raises(UserError, match="SLURM_NTASKS is not set") as refused:
        find_place(env)
    assert re.search("by the launcher", str(refused.value))
