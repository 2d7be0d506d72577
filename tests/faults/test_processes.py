"""Whatever happens to one process of a run, the whole run ends soon, and says what came first.

Rows of the list of faults: 73-79. Most strike a run that only waits for all of its processes in
turn (together.py), which starts in seconds; some strike a training.
"""

import json
import re
import shutil
import signal
from contextlib import ExitStack

import pytest
from several import FAULTS, ROOT, Job

pytestmark = pytest.mark.slow
LIMIT_S = 30  # from the fault to the end of the last process
TOGETHER = str(FAULTS / "together.py")
RAISED = r"RuntimeError: a fault that was asked for \(UTA_FAULT\)"
KILLED = r"process {} \(host \S+, pid \d+\) ended without a word: killed, or its host lost"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders beside each other share compilations."""
    return tmp_path_factory.mktemp("several")


def training(base, name, *overrides):
    return (
        "-m", "uta_jax", "train", f"--config={FAULTS / 'tiny.py'}", f"--workdir={base / name}.run",
        "--config.data.workers=0", "--config.eval.path=", *overrides,
    )  # fmt: skip


def strike(job, fault, struck):
    """Wait for the fault, and for the end of all; their exit codes."""
    job.wait_for(f"UTA_FAULT: {fault.split(':')[1]} at", struck)  # it did happen
    return job.codes(LIMIT_S)


def check_last_words(job, pattern, numbers):
    """The cause is the last line of each, under the number of the process that it befell."""
    for number in numbers:
        assert re.search(f"{pattern}$", job.last_line(number)), job.all()


@pytest.mark.parametrize("fault, struck, count", [("step:raise:5", 1, 3), ("step:raise:5", 0, 2)])
def test_73_an_exception_in_one_ends_all_with_its_traceback(fault, struck, count, base):
    """Process 2 has no line to process 1 and hears of it by way of the first."""
    each = {struck: {"UTA_FAULT": fault}}
    with Job(base / f"raise-{struck}", TOGETHER, "{}", count=count, each=each) as job:
        assert strike(job, fault, struck) == [1] * count
        check_last_words(job, RAISED, range(count))
        for number in range(count):
            said = job.err(number)
            assert said.count("Traceback") == 1 and f"process {struck} (host" in said, job.all()
            assert 'faults.reach("step")' in said  # where it was


@pytest.mark.parametrize("struck", [1, 0], ids=["another", "the coordinator"])
def test_74_76_a_killed_process_is_named_by_the_others(struck, base):
    """JAX's runtime fails in all of them as well, in ways of its own: none is the last word."""
    each = {struck: {"UTA_FAULT": "step:kill:5"}}
    with Job(base / f"kill-{struck}", TOGETHER, "{}", count=3, each=each) as job:
        codes = strike(job, "step:kill:5", struck)
        others = [n for n in range(3) if n != struck]
        assert codes.pop(struck) == -signal.SIGKILL and codes == [1, 1]
        check_last_words(job, KILLED.format(struck), others)


def test_75_a_stopped_process_is_missed_by_its_silence(base):
    """With the time-outs as they are by default, whichever it is; continued, it ends as well."""
    with ExitStack() as stack:
        fault = {"UTA_FAULT": "step:stop:5"}
        jobs = [Job(base / f"stop-{n}", TOGETHER, "{}", each={n: fault}) for n in (0, 1)]
        for struck, job in enumerate(map(stack.enter_context, jobs)):
            job.wait_for("UTA_FAULT: stop at", struck)
        for struck, job in enumerate(jobs):
            assert job.codes(LIMIT_S, 1 - struck) == [1]
            silent = rf"process {struck} \(.*\) has been silent for 2\d s \(.*heartbeat_s=20\).*"
            check_last_words(job, silent, [1 - struck])
            assert job.processes[struck].poll() is None  # stopped still: the fault was there
            job.send(struck, signal.SIGCONT)
            assert job.codes(LIMIT_S, struck) == [1]
            check_last_words(job, silent, [struck])


def test_77_a_process_that_never_starts_is_named(base):
    options = json.dumps({"start_s": 4})
    with (
        Job(base / "no-2", TOGETHER, options, count=3, started=(0, 1)) as without_2,
        Job(base / "no-0", TOGETHER, options, count=2, started=(1,)) as without_0,
    ):
        assert without_2.codes(LIMIT_S) == [2, 2] and without_0.codes(LIMIT_S) == [2]
        check_last_words(
            without_2, r"waited 4 s for 1 of 3 processes: missing 2: .*start_s.*", (0, 1)
        )
        check_last_words(without_0, r"nothing answers at 127\.0\.0\.1:\d+ for 4 s .*", (1,))
        for job in (without_2, without_0):
            assert all("Traceback" not in job.err(number) for number in job.processes)


def test_78_another_code_is_refused_at_the_roll_call(base):
    shutil.copytree(ROOT / "uta_jax", base / "other" / "uta_jax")
    with (base / "other" / "uta_jax" / "step.py").open("a") as file:
        file.write("# changed here\n")
    each = {1: {"PYTHONPATH": str(base / "other")}}
    with Job(base / "code", TOGETHER, "{}", each=each) as job:
        assert job.codes(LIMIT_S) == [2, 2]
        check_last_words(
            job, r"process 1 \(.*\) runs uta-jax .* but process 0 .*: install the same", (0, 1)
        )


def test_78_another_configuration_is_refused_before_anything_is_compiled(base):
    other = training(base, "config", "--config.optim.lr=1e-4")
    each = {1: {"ARGV": " ".join(other)}}
    with Job(base / "config", *training(base, "config"), each=each) as job:
        assert job.codes(LIMIT_S) == [2, 2]
        odd = r"what to train: process \d .* has config\.optim\.lr = .*: start all with the same"
        check_last_words(job, odd, (0, 1))
        assert all(rate in job.last_line(0) for rate in ("0.0001", "0.0015"))
        assert not (base / "config.run").exists()


def test_79_a_process_without_data_ends_the_training_by_name(base):
    """It cannot be by construction: all count the batches alike. Here one is made to run out."""
    argv = training(base, "data")
    early = {1: {"ARGV": " ".join((str(FAULTS / "ends_early.py"), *argv[2:]))}}
    with Job(base / "data", *argv, each=early) as job:
        job.wait_for("the data ended", 1)
        assert job.codes(LIMIT_S) == [1, 1]
        check_last_words(job, "RuntimeError: the data ended before batch 2", (0, 1))
        assert "process 1 (host" in job.err(0) and job.err(0).count("Traceback") == 1


def test_76_a_training_whose_coordinator_is_killed(base):
    each = {0: {"UTA_FAULT": "step:kill:3"}}
    with Job(base / "train", *training(base, "train"), each=each) as job:
        assert strike(job, "step:kill", 0) == [-signal.SIGKILL, 1]
        check_last_words(job, KILLED.format(0), [1])
