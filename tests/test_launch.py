"""The scripts of launch/, against clouds and clusters that only record what they are asked."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sbatch", "local_gpu.sh", "local.sh")
TRAINING = ("--config=configs/demo.py", "--workdir=a b/run", "--config.eval.templates=('{}', '$x')")
COMMANDS = {
    "tpu_vm.sh": ("--name=t1", "--zone=us-central1-a", "--topology=v5e:4x4"),
    "gke.sh": ("--name=t1", "--topology=v5e:4x4", "--image=r/i:t", "--bucket=gs://b"),
    "slurm.sbatch": ("--nodes=2", "--gpus-per-node=4", "--partition=my gpus"),
    "local_gpu.sh": ("--image=i", "--gpus=0,1", "--env=HF_TOKEN"),
    "local.sh": ("--processes=2", "--devices=3"),
}
SECRETS = {"WANDB_API_KEY": "wandb-secret-1", "HF_TOKEN": "hf-secret-2"}

# A program that notes its arguments and answers as it was told: the n-th answer to the n-th call
# that a pattern fits, the last one for ever after.
FAKE = """#!{python}
import json, os, re, sys
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
calls = Path(os.environ["FAKE_CALLS"])
line = " ".join([name, *words])
before = [" ".join(json.loads(l)) for l in calls.read_text().splitlines()] if calls.exists() else []
with calls.open("a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
for pattern, answers in json.loads(os.environ["FAKE_ANSWERS"]).items():
    if re.search(pattern, line):
        seen = sum(bool(re.search(pattern, l)) for l in before)
        code, text = answers[min(seen, len(answers) - 1)]
        print(text)
        sys.exit(code)
"""
FAKES = (
    "gcloud",
    "kubectl",
    "docker",
    "sbatch",
    "srun",
    "scontrol",
    "nvidia-smi",
    "git",
    "uta-jax",
)


class Cluster:
    """Runs scripts where every program that would leave this machine is a fake."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in (*FAKES, "uv", "gcsfuse", "mountpoint"):
            self.fake(self.bin / name)

    def fake(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)

    def run(self, script, *argv, answers=None, env=None):
        self.file = self.folder / f"calls-{len(list(self.folder.glob('calls-*')))}"
        self.file.touch()
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder),
            "FAKE_CALLS": str(self.file), "FAKE_ANSWERS": json.dumps(answers or {}),
            **SECRETS, **(env or {}),
        }  # fmt: skip
        return subprocess.run(
            [str(LAUNCH / script), *argv],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        """What was really called, words apart; ``git status`` only looks."""
        calls = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [call for call in calls if call[0] != "git" or "status" not in call]

    def verbs(self) -> list[str]:
        """The calls of gcloud in short: create, describe, setup, start, watch, delete."""
        found = []
        for call in self.calls:
            line = " ".join(call)
            verb = re.search(r"tpu_host.sh (\w+)|(create|describe|delete) ", line)
            found += [verb[1] or verb[2]] if verb else []
        return found


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def settled(words):
    """Words without the names of temporary folders."""
    return [re.sub(r"/tmp/tmp\.\w+", "/tmp/X", word) for word in words]


def printed_commands(text):
    """Lines of output that are commands, as a shell reads them."""
    lines = [line for line in text.splitlines() if line.split(" ")[0] in (*FAKES, "env", "mkdir")]
    commands = [settled(shlex.split(line)) for line in lines]
    return [without_environment(words) for words in commands]


def without_environment(words):
    """``env NAME=VALUE COMMAND``: the command, which is all that a fake notes."""
    if words[0] != "env":
        return words
    return list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words[1:]))


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).with_name("shellcheck")
    files = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *(ROOT / "tests").rglob("*.sh")]
    assert len(files) >= 6
    done = subprocess.run(
        [checker, "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_that_the_script_accepts(script, cluster):
    done = cluster.run(script, "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and cluster.calls == []
    text = done.stdout.replace("\\\n", " ")
    example = re.search(rf"^ *launch/{script} (.*)$", text, re.MULTILINE)[1]
    (cluster.folder / "secrets.env").write_text("HF_TOKEN=x\n")
    argv = shlex.split(example.replace("$PWD", str(cluster.folder)))
    assert cluster.run(script, "--dry-run", *argv).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(script, cluster):
    argv = [*COMMANDS[script], "--", *TRAINING]
    dry = cluster.run(script, "--dry-run", *argv)
    assert (dry.returncode, cluster.calls) == (0, []), dry.stderr
    real = cluster.run(script, *argv)
    assert real.returncode == 0, real.stderr
    promised = [c for c in printed_commands(dry.stdout) if c[0] not in ("mkdir", "srun")]
    assert len(promised) >= 1
    assert promised == [settled(call) for call in cluster.calls]
    assert (
        printed_commands(dry.stdout)[: len(promised)]
        == printed_commands(real.stdout)[: len(promised)]
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_arguments_of_training_arrive_as_they_were_given(script, cluster):
    cluster.run(script, *COMMANDS[script], "--", *TRAINING)
    if script == "tpu_vm.sh":
        remote = [w for c in cluster.calls for w in c if "tpu_host.sh start" in w]
        words = shlex.split(remote[0].removeprefix("--command="))
    elif script == "gke.sh":
        assert cluster.run(script, *COMMANDS[script], "--render", "--", *TRAINING).returncode == 0
        words = container(rendered(cluster))["args"]
        words = [word.replace("$$", "$") for word in words]  # as Kubernetes reads it
    else:
        words = cluster.calls[-1]
    assert tuple(words[-len(TRAINING) :]) == TRAINING


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mode", ["--dry-run", ""])
def test_no_secret_is_printed_or_becomes_an_argument(script, mode, cluster):
    file = cluster.folder / "secrets.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    extra = {"tpu_vm.sh": [f"--env-file={file}"], "gke.sh": ["--secret=uta-jax"]}.get(script, [])
    argv = [*([mode] if mode else []), *COMMANDS[script], *extra]
    done = cluster.run(script, *argv, "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    seen = done.stdout + done.stderr + cluster.file.read_text()
    assert not [value for value in SECRETS.values() if value in seen]
    if script == "local_gpu.sh" and not mode:
        assert "--env=HF_TOKEN" in cluster.calls[-1]


def test_a_secret_given_as_an_argument_is_refused_unseen(cluster):
    argv = [*COMMANDS["local_gpu.sh"], "--env=WANDB_API_KEY=wandb-secret-1", "--", *TRAINING]
    done = cluster.run("local_gpu.sh", *argv)
    assert done.returncode == 2 and "wandb-secret-1" not in done.stdout + done.stderr
    bad = cluster.folder / "bad.env"
    bad.write_text("# names\nHF_TOKEN=hf-secret-2\nexport X=wandb-secret-1\n")
    argv = [*COMMANDS["tpu_vm.sh"], f"--env-file={bad}", "--", *TRAINING]
    done = cluster.run("tpu_vm.sh", *argv)
    assert done.returncode == 2 and "line 3" in done.stderr
    assert "wandb-secret-1" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "script, changes, words",
    [
        ("tpu_vm.sh", {"--name=t1": ""}, "--name is missing"),
        ("tpu_vm.sh", {"--zone=us-central1-a": ""}, "UTA_ZONE"),
        ("tpu_vm.sh", {"--topology=v5e:4x4": "--topology=v5e"}, "--topology=v5e"),
        ("tpu_vm.sh", {"--topology=v5e:4x4": "--topology=v5e:4x5"}, "16x16"),
        ("tpu_vm.sh", {"--name=t1": "--name=T 1"}, "--name=T 1"),
        ("tpu_vm.sh", {"--name=t1": "--name=t1 --attempts=many"}, "--attempts=many"),
        ("tpu_vm.sh", {"--name=t1": "--name=t1 --sport"}, "--sport"),
        ("tpu_vm.sh", {"--name=t1": "--name=t1 --env-file=/none"}, "--env-file=/none"),
        ("gke.sh", {"--image=r/i:t": ""}, "UTA_IMAGE"),
        ("gke.sh", {"--bucket=gs://b": ""}, "UTA_BUCKET"),
        ("gke.sh", {"--bucket=gs://b": '--bucket=b"x'}, "--bucket=b"),
        ("gke.sh", {"--bucket=gs://b": "--bucket=b --chips-per-host=3"}, "does not divide"),
        ("slurm.sbatch", {"--nodes=2": "--nodes=two"}, "--nodes=two"),
        ("local_gpu.sh", {"--gpus=0,1": "--gpus=all"}, "--gpus=all"),
        ("local_gpu.sh", {"--env=HF_TOKEN": "--env=NOT_SET"}, "--env=NOT_SET"),
        ("local.sh", {"--processes=2": ""}, "--processes="),
        ("local.sh", {"--devices=3": "--devices=0"}, "--devices=0"),
        ("local.sh", {"--devices=3": "--device=3"}, "--device=3"),
    ],
)
def test_a_mistake_costs_one_line_and_no_call(script, changes, words, cluster):
    argv = []
    for word in COMMANDS[script]:
        new = changes.get(word, word)
        argv += re.split(r" (?=--)", new) if new else []
    done = cluster.run(script, *argv, "--", *TRAINING)
    assert (done.returncode, cluster.calls, done.stderr.count("\n")) == (2, [], 1), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("script", SCRIPTS[:-1])
@pytest.mark.parametrize("missing", ["--config=", "--workdir="])
def test_training_without_a_recipe_or_a_workdir(script, missing, cluster):
    training = [word for word in TRAINING if not word.startswith(missing)]
    done = cluster.run(script, *COMMANDS[script], "--", *training)
    assert done.returncode == 2 and missing in done.stderr
    assert not [c for c in cluster.calls if c[0] != "nvidia-smi"]


# TPU VMs

WATCH, STATE = "tpu_host.sh watch", r"tpu-vm describe"
RUN = ["setup", "start", "watch"]


@pytest.mark.parametrize(
    "topology, name", [("v5e:4x4", "v5litepod-16"), ("v6e:8x8", "v6e-64"), ("v5p:2x2x4", "v5p-32")]
)
@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_a_slice_goes_by_the_name_that_gcloud_has_for_it(topology, name, queued, cluster):
    """The released gcloud takes --type and --topology of old generations only."""
    argv = [*COMMANDS["tpu_vm.sh"], f"--topology={topology}", *queued, "--dry-run", "--", *TRAINING]
    done = cluster.run("tpu_vm.sh", *argv)
    created = [words for words in printed_commands(done.stdout) if "create" in words]
    assert f"--accelerator-type={name}" in created[0]
    software = {"v5e": "v2-alpha-tpuv5-lite", "v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5"}
    version = "--runtime-version" if queued else "--version"
    assert f"{version}={software[topology[:3]]}" in created[0]


def train_on_tpu(cluster, answers, *flags):
    argv = [*COMMANDS["tpu_vm.sh"], "--poll=0", *flags, "--", *TRAINING]
    return cluster.run("tpu_vm.sh", *argv, answers=answers)


def test_a_preempted_tpu_is_made_again_and_the_run_goes_on(cluster):
    answers = {WATCH: [(255, ""), (0, "done")], STATE: [(1, ""), (0, "PREEMPTED")]}
    done = train_on_tpu(cluster, answers, "--spot")
    assert done.returncode == 0, done.stderr
    first = ["describe", "create", *RUN, "describe"]
    assert cluster.verbs() == [*first, "delete", "create", *RUN, "delete"]
    created = [call for call in cluster.calls if "create" in call]
    assert created[0] == created[1] and "--spot" in created[0]
    started = [call for call in cluster.calls if "tpu_host.sh start" in " ".join(call)]
    assert started[0] == started[1]


def test_hosts_that_fail_a_little_before_the_preemption_shows(cluster):
    answers = {
        WATCH: [(10, "exit code 13"), (0, "")],
        STATE: [(1, ""), (0, "STOPPING"), (0, "PREEMPTED")],
    }
    assert train_on_tpu(cluster, answers).returncode == 0
    assert cluster.verbs().count("create") == 2


@pytest.mark.parametrize("code", [1, 255, 75])
def test_a_lost_connection_is_made_again_without_a_new_tpu(code, cluster):
    """So is a training that was told to stop, by the maintenance of its host."""
    answers = {WATCH: [(code, ""), (0, "")], STATE: [(1, ""), (0, "READY")]}
    assert train_on_tpu(cluster, answers).returncode == 0
    assert cluster.verbs() == ["describe", "create", *RUN, "describe", *RUN, "delete"]


@pytest.mark.parametrize("code, expected", [(10, 1), (2, 2)])
def test_a_training_that_fails_ends_it_all_and_frees_the_tpu(code, expected, cluster):
    answers = {WATCH: [(code, "")], STATE: [(1, ""), (0, "READY")]}
    assert train_on_tpu(cluster, answers).returncode == expected
    assert cluster.verbs().count("watch") == 1 and cluster.verbs()[-1] == "delete"


def test_preemptions_without_end_are_given_up(cluster):
    answers = {WATCH: [(1, "")], STATE: [(1, ""), (0, "PREEMPTED")]}
    done = train_on_tpu(cluster, answers, "--attempts=3")
    assert done.returncode == 1 and "3 attempts" in done.stderr
    assert cluster.verbs().count("create") == 3 and cluster.verbs()[-1] == "delete"


def test_a_tpu_that_cannot_be_created(cluster):
    done = train_on_tpu(cluster, {"create": [(1, "")], STATE: [(1, "")]})
    assert done.returncode == 1 and "--queued" in done.stderr
    assert cluster.verbs() == ["describe", "create"]


def test_an_installation_that_fails_is_no_mistake_of_the_recipe(cluster):
    """tar and uv exit with 2 as well: nothing is started, and it is tried again."""
    answers = {"tpu_host.sh setup": [(2, "")], STATE: [(1, ""), (0, "READY")]}
    assert train_on_tpu(cluster, answers, "--attempts=2").returncode == 1
    assert cluster.verbs().count("setup") == 2 and "start" not in cluster.verbs()
    assert cluster.verbs()[-1] == "delete"


def test_a_tpu_that_runs_already_is_taken_up_and_may_be_kept(cluster):
    done = train_on_tpu(cluster, {STATE: [(0, "READY")]}, "--keep")
    assert done.returncode == 0 and "kept" in done.stdout
    assert cluster.verbs() == ["describe", *RUN]


def test_the_queue_is_waited_for(cluster):
    queue = [(1, ""), (0, "WAITING_FOR_RESOURCES"), (0, "PROVISIONING"), (0, "ACTIVE")]
    answers = {"queued-resources describe": queue, STATE: [(1, "")]}
    assert train_on_tpu(cluster, answers, "--queued").returncode == 0
    assert cluster.verbs() == [*["describe"] * 2, "create", *["describe"] * 3, *RUN, "delete"]
    deleted = cluster.calls[-1]
    assert "queued-resources" in deleted and "--force" in deleted


def test_a_request_that_fails_in_the_queue_is_removed(cluster):
    answers = {"queued-resources describe": [(1, ""), (0, "FAILED")], STATE: [(1, "")]}
    assert train_on_tpu(cluster, answers, "--queued").returncode == 1
    assert cluster.verbs() == [*["describe"] * 2, "create", "describe", "delete"]


def test_a_place_in_the_queue_is_kept(cluster):
    """The command was given before, and comes again while the request waits."""
    queue = [(0, "WAITING_FOR_RESOURCES"), (0, "ACTIVE")]
    answers = {"queued-resources describe": queue, STATE: [(1, "")]}
    assert train_on_tpu(cluster, answers, "--queued").returncode == 0
    assert "create" not in cluster.verbs()


def test_a_place_whose_tpu_was_preempted_is_given_up(cluster):
    answers = {
        "queued-resources describe": [(1, ""), (0, "ACTIVE"), (0, "SUSPENDED"), (0, "ACTIVE")],
        STATE: [(1, "")],
        WATCH: [(1, ""), (0, "")],
    }
    assert train_on_tpu(cluster, answers, "--queued").returncode == 0
    assert cluster.verbs().count("create") == cluster.verbs().count("delete") == 2


class Host:
    """tpu_host.sh in a home directory of its own."""

    def __init__(self, cluster):
        self.cluster = cluster
        cluster.fake(cluster.folder / "venv" / "bin" / "uta-jax")
        secrets = "".join(f"{name}={value}\n" for name, value in SECRETS.items())
        (cluster.folder / ".uta_jax_env").write_text(secrets)

    def __call__(self, *argv, answers=None):
        return self.cluster.run("tpu_host.sh", *argv, answers=answers)


@pytest.mark.parametrize("code, expected", [(0, 0), (2, 2), (75, 75), (1, 10)])
def test_a_host_trains_in_the_background_and_is_watched(code, expected, cluster):
    host = Host(cluster)
    assert host("start", *TRAINING, answers={"uta-jax": [(code, "step 1")]}).returncode == 0
    calls = cluster.file
    done = host("watch")
    assert (done.returncode, done.stdout.count("step 1")) == (expected, 1)
    assert f"exit code {code}" in done.stdout
    assert json.loads(calls.read_text()) == ["uta-jax", "train", *TRAINING]


def test_a_host_that_trains_already_starts_nothing(cluster):
    host = Host(cluster)
    slow = cluster.folder / "venv" / "bin" / "uta-jax"
    slow.write_text("#!/bin/bash\necho token ${#HF_TOKEN}\nsleep 2\necho end >> $HOME/ends\n")
    for _ in range(2):
        begun = time.monotonic()
        assert host("start", *TRAINING).returncode == 0
        assert time.monotonic() - begun < 2
    done = host("watch")
    assert done.returncode == 0 and f"token {len(SECRETS['HF_TOKEN'])}" in done.stdout
    assert (cluster.folder / "ends").read_text() == "end\n"


def test_a_host_installs_the_package_and_mounts_the_bucket(cluster):
    done = Host(cluster)("setup", "bucket", answers={"mountpoint": [(1, "")]})
    assert done.returncode == 0, done.stderr
    installed = [call for call in cluster.calls if call[:3] == ["uv", "pip", "install"]]
    assert installed[0][-1] == f"{ROOT}[tpu,gcs]"
    assert cluster.calls[-1][0] == "gcsfuse" and cluster.calls[-1][-2] == "bucket"
    assert (cluster.folder / ".uta_jax_env").stat().st_mode & 0o777 == 0o600


# Kubernetes


def rendered(cluster, *flags):
    done = cluster.run("gke.sh", *COMMANDS["gke.sh"], *flags, "--render", "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def container(jobset):
    return pod(jobset)["containers"][0]


@pytest.mark.parametrize(
    "topology, chips, hosts, accelerator, xpk",
    [
        ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice", "v5litepod-16"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice", "v5litepod-1"),
        ("v6e:8x8", 4, 16, "tpu-v6e-slice", "v6e-64"),
        ("v5p:2x2x4", 4, 4, "tpu-v5p-slice", "v5p-32"),
        ("v4:2x2x2", 4, 2, "tpu-v4-podslice", "v4-16"),
    ],
)
def test_a_pod_for_every_host_of_the_slice(topology, chips, hosts, accelerator, xpk, cluster):
    jobset = rendered(cluster, f"--topology={topology}")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    selector = pod(jobset)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    resources = container(jobset)["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    argv = [*COMMANDS["gke.sh"], f"--topology={topology}", "--dry-run", "--", *TRAINING]
    line = cluster.run("gke.sh", *argv).stdout.splitlines()[-1].removeprefix("# ")
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"] and f"--tpu-type={xpk}" in words
    command = words[-1].removeprefix("--command=")
    assert shlex.split(command) == ["uta-jax", "train", *TRAINING]


def test_the_jobset_has_the_fields_of_its_api(cluster):
    """jobset.x-k8s.io/v1alpha2: JobSetSpec, FailurePolicy, ReplicatedJob; batch/v1 and core/v1."""
    jobset = rendered(cluster)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert spec.keys() <= {"replicatedJobs", "network", "successPolicy", "failurePolicy"}
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == 20
    (rule,) = policy["rules"]
    assert rule.keys() == {"name", "action", "onJobFailureReasons"}
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = spec["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    (stop,) = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert stop["action"] == "FailJob" and stop["onExitCodes"]["values"] == [2]
    assert stop["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert pod(jobset)["restartPolicy"] == "Never"  # a podFailurePolicy wants it
    mounted = {mount["name"] for mount in container(jobset)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(jobset)["volumes"]}
    assert container(jobset)["envFrom"] == [{"secretRef": {"name": "uta-jax", "optional": True}}]
    assert "${" not in json.dumps(jobset).replace("$${", "")


def test_a_jobset_is_deleted_by_its_name(cluster):
    done = cluster.run("gke.sh", "--name=t1", "--namespace=n", "--delete")
    assert done.returncode == 0
    assert cluster.calls == [["kubectl", "--namespace=n", "delete", "jobset", "t1"]]


# Slurm, SkyPilot, Docker, GPUs


def in_job(cluster, *argv, code=0, **environment):
    env = {"SLURM_JOB_ID": "7", **environment}
    return cluster.run("slurm.sbatch", *argv, env=env, answers={"^srun": [(code, "")]})


def test_a_job_starts_a_task_for_each_gpu_and_says_how_it_ended(cluster):
    done = in_job(cluster, *TRAINING, SLURM_GPUS_ON_NODE="4", UTA_JAX="uta-jax")
    assert done.returncode == 0
    flags = ["--kill-on-bad-exit=0", "--gpu-bind=none"]
    assert cluster.calls == [["srun", *flags, "uta-jax", "train", *TRAINING]]
    assert in_job(cluster, *TRAINING, code=2).returncode == 2
    assert [call[0] for call in cluster.calls] == ["srun"]


@pytest.mark.parametrize("code", [75, 143])
def test_a_job_that_was_told_to_stop_is_queued_again_but_not_for_ever(code, cluster):
    in_job(cluster, *TRAINING, code=code)
    assert cluster.calls[-1] == ["scontrol", "requeue", "7"]
    in_job(cluster, *TRAINING, code=code, SLURM_RESTART_COUNT="20")
    assert [call[0] for call in cluster.calls] == ["srun"]


def test_skypilot_rents_gpus_and_holds_no_secret():
    text = (LAUNCH / "skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    assert task.keys() == {
        "name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert not task["envs"].keys() & SECRETS.keys()
    assert task["file_mounts"]["/bucket"]["source"].startswith("gs://")


@pytest.mark.parametrize("training, code", [(TRAINING, 0), ((), 2)])
def test_skypilot_passes_the_arguments_on(training, code, cluster):
    cluster.fake(cluster.folder / "venv" / "bin" / "uta-jax")
    script = cluster.folder / "run.sh"
    script.write_text(
        "#!/bin/bash\n" + yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    )
    script.chmod(0o755)
    env = {"TRAIN": shlex.join(training), "EXTRA": "cuda"}
    assert cluster.run(script, env=env).returncode == code
    assert cluster.calls == ([["uta-jax", "train", *training]] if training else [])


def test_no_gpu_is_refused(cluster):
    answers = {"nvidia-smi": [(9, "")]}
    done = cluster.run("local_gpu.sh", "--", *TRAINING, answers=answers)
    assert done.returncode == 2 and "no GPU" in done.stderr
    assert [call[0] for call in cluster.calls] == ["nvidia-smi"]


def test_gpus_of_this_machine_without_an_image(cluster):
    done = cluster.run("local_gpu.sh", "--gpus=1", "--", *TRAINING)
    assert done.returncode == 0
    assert cluster.calls[-1] == ["uta-jax", "train", *TRAINING]
    assert "CUDA_VISIBLE_DEVICES=1" in done.stdout and "JAX_PLATFORMS=cuda,cpu" in done.stdout


TOLD = """#!{python}
import os, signal, sys, time
env = os.environ
one = env["JAX_PROCESS_ID"] == "1"  # may be ending when the others are told
tell = lambda *_: (print("told", file=sys.stderr), sys.exit(75))
signal.signal(signal.SIGTERM, signal.SIG_IGN if one else tell)
print(env["JAX_PROCESS_ID"], env["JAX_NUM_PROCESSES"], env["JAX_COORDINATOR_ADDRESS"])
if one:
    sys.exit(int(env["CODE"]))
time.sleep(float(env["REST"]))
"""


def in_processes(cluster, code, rest_s):
    """Three, of which number 1 ends with ``code`` and the others after ``rest_s`` seconds."""
    (cluster.bin / "uta-jax").write_text(TOLD.format(python=sys.executable))
    env = {"PATH": f"{cluster.bin}:/usr/bin:/bin", "CODE": str(code), "REST": str(rest_s)}
    command = [str(LAUNCH / "local.sh"), "--processes=3", "--", "train"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def test_processes_of_this_machine_are_told_where_they_are(cluster):
    running = in_processes(cluster, code=0, rest_s=0)
    out, error = running.communicate(timeout=40)
    assert running.returncode == 0 and error == ""
    lines = sorted(line for line in out.splitlines() if line.startswith("["))
    places = [re.fullmatch(r"\[(\d)\] (\d) 3 127\.0\.0\.1:(\d+)", line) for line in lines]
    assert [(place[1], place[2]) for place in places] == [(n, n) for n in "012"]
    assert len({place[3] for place in places}) == 1


def test_a_process_that_fails_gives_the_exit_code_and_the_others_are_ended(cluster):
    begun = time.monotonic()
    running = in_processes(cluster, code=3, rest_s=60)
    _, error = running.communicate(timeout=40)
    assert running.returncode == 3 and time.monotonic() - begun > 4  # they were given time
    assert error == ""


def test_a_signal_reaches_every_process(cluster):
    running = in_processes(cluster, code=0, rest_s=60)
    said = [running.stdout.readline() for _ in range(6)]  # the commands, and from each its place
    assert sum(line.startswith("[") for line in said) == 3
    running.terminate()
    error = running.communicate(timeout=40)[1]
    assert running.returncode == 75 and sorted(error.splitlines()) == ["[0] told", "[2] told"]


def test_the_image_runs_as_a_user_and_is_made_of_known_files():
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line]
    assert ["FROM", "python:3.11-slim"] in lines
    assert [line for line in lines if line[0] == "USER"] == [["USER", "uta"]]
    known = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in known
    for line in lines:
        if line[0] == "COPY":
            for source in line[1:-1]:
                assert (ROOT / source).exists() and f"!{source}" in known
    extras = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in extras for extra in ("tpu", "cuda", "cpu", "gcs"))
    words = " ".join(word for line in lines if line[0] in ("ENV", "ARG", "RUN") for word in line)
    assert not re.search("TOKEN|KEY|PASSWORD|SECRET", words)


def test_scripts_can_be_run():
    assert all(os.access(LAUNCH / name, os.X_OK) for name in (*SCRIPTS, "tpu_host.sh"))
