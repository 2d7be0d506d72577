"""What workers and the machine do to a loader: each fault really happens, and is named in time.

Rows of the list of faults: 24, 30-32, 40-50.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from example_data import write_record_files, write_tars
from faulty import Faulty, Modules
from pictures import Pictures

from uta_jax import UserError
from uta_jax.data.examples import TrainExamples
from uta_jax.data.loader import Reading, TrainLoader, eval_batches
from uta_jax.data.pictures import Pictures as BenchPictures
from uta_jax.data.sources import ArrayRecordSource, TarSource
from uta_jax.data.workers import Crew

TESTS = Path(__file__).parents[1]


def loader(source, workers=0, timeout_s=30.0, **options):
    defaults = {"batch_size": 8, "seed": 1, "image_size": 8, "crop_scale": (0.4, 1)}
    return TrainLoader(source, reading=Reading(workers, 2, timeout_s), **defaults | options)


def until_it_fails(stream, kind=UserError, batches=200, within=10):
    """The error of a stream that has to fail soon, and how long it took."""
    start = time.monotonic()
    try:
        with pytest.raises(kind) as error:
            for _ in range(batches):
                next(stream)
        assert time.monotonic() - start < within
        return error.value
    finally:
        stream.close()


def workers_of(stream):
    return stream._running[0].pids


def is_gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Too many bad examples


def test_24_too_many_bad_examples_stop_the_run_with_fraction_threshold_and_keys(tmp_path):
    bad = tuple(range(0, 400, 20))  # 5 %
    stream = loader(Pictures(400, bad=bad), bad_file=tmp_path / "bad_examples.jsonl")
    message = str(until_it_fails(stream))
    lines = (tmp_path / "bad_examples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 10  # 0.1 % of 10,000
    assert all(int(row["key"].removeprefix("pic-")) in bad for row in rows)
    assert f"{len(rows)} of the first" in message and "data.max_bad_fraction=0.001" in message
    assert all(repr(row["key"]) in message for row in rows[:5]) and "bad_examples.jsonl" in message
    assert 0.03 < float(re.search(r"\((.*)%\)", message)[1]) / 100 < 0.08


@pytest.mark.parametrize("fraction, stops", [(0.0, 1), (0.0005, 6), (0.001, 11)])
def test_24_the_threshold_is_that_of_10000_examples_until_they_are_seen(fraction, stops):
    stream = loader(Pictures(4000, bad=range(0, 4000, 40)), max_bad_fraction=fraction, batch_size=1)
    until_it_fails(stream, batches=600)
    assert stream.bad_examples == stops


def test_24_a_threshold_of_one_never_stops():
    source = Pictures(40, bad=range(0, 40, 2))
    stream = loader(source, max_bad_fraction=1.0)
    assert all(next(stream)["index"].all() for _ in range(20))  # 0 is bad
    assert stream.bad_examples > 50
    stream.close()


@pytest.mark.parametrize("fraction", [0.001, 1.0])
def test_24_a_set_that_is_broken_through_and_through_stops_at_once(fraction):
    message = str(until_it_fails(loader(Pictures(40, bad=range(40)), max_bad_fraction=fraction)))
    assert "cannot be used" in message and message.count("'pic-") == 5 and "not an image" in message


# Too little data


def test_30_31_32_too_little_data_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="no examples"):
        loader(Pictures(0, read=(read := [])))
    with pytest.raises(UserError, match="batch_size=8: the data has 7 examples"):
        loader(Pictures(7, read=read))
    with pytest.raises(UserError, match="batch_size=8: .*divisible by the 16 processes"):
        loader(Pictures(64, read=read), process_index=0, process_count=16)
    assert not read


# A dataset, seed or worker count that changed


@pytest.mark.parametrize(
    "shards, examples, change",
    [
        (4, 4, "examples: 12 -> 16; shards: 3 -> 4"),  # grew
        (2, 4, "examples: 12 -> 8; shards: 3 -> 2"),  # shrank
        (2, 6, "shards: 3 -> 2"),  # the same examples in other shards
    ],
)
def test_40_a_dataset_that_changed_is_refused_with_a_diff(shards, examples, change, tmp_path):
    state = loader(TarSource(write_tars(tmp_path))).state()
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    source = TarSource(write_tars(tmp_path, shards, examples))
    assert len(source) == shards * examples
    with pytest.raises(UserError, match=f"fingerprint: .*{change}.*--allow_data_change"):
        loader(source).resume(state)
    assert change in loader(source).resume(state, allow_change=True)


def test_41_workers_may_change_at_a_resume_but_not_the_seed():
    stream = loader(Pictures(40), workers=2)
    for _ in range(3):
        next(stream)
    state, expected = stream.state(), [next(stream)["image"] for _ in range(3)]
    stream.close()
    for workers in (0, 1, 3):
        other = loader(Pictures(40), workers=workers)
        other.resume(state)
        assert all(np.array_equal(next(other)["image"], image) for image in expected)
        other.close()
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        loader(Pictures(40), seed=2).resume(state)


def test_42_10007_examples_over_3_processes_count_10007():
    ids, batches = [], set()
    for process in range(3):
        stream = eval_batches(
            Pictures(10_007, side=1, text=False), batch_size=384, image_size=1,
            process_index=process, process_count=3,
        )  # fmt: skip
        mine = [batch["index"][batch["valid"]] for batch in stream]
        ids += np.concatenate(mine).tolist()
        batches.add(len(mine))
    assert len(ids) == 10_007 and sorted(ids) == [*range(10_007)] and batches == {27}


# Workers that hang, die or fail


@pytest.mark.parametrize("workers", [0, 2])
def test_43_a_reader_that_blocks_is_named_with_its_stack(workers, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    source = Faulty(40, "block", at=(3,), beside=tmp_path / "fifo")
    stream = loader(source, workers=workers, timeout_s=1.0)
    message = str(until_it_fails(stream))
    assert re.search(r"no batch for 1 s \(data.timeout_s\): data (thread|worker) \d", message)
    assert re.search(r"has spent [1-9]\.\d s on example 3", message)
    assert re.search(r'faulty.py", line \d+ in block', message) and "\n" not in message
    if not workers:  # let the thread end
        os.close(os.open(tmp_path / "fifo", os.O_WRONLY))


@pytest.mark.parametrize(
    "what, words",
    [
        ("die", r"was killed by signal 9 \(SIGKILL\), most likely out of memory: lower data.work"),
        ("bus_error", r"was killed by signal 7 \(SIGBUS\), .*memory.*bus_error"),
        ("exit", "ended with exit code 3"),
    ],
)
def test_44_a_worker_that_dies_is_named_with_the_cause_and_the_example(what, words):
    stream = loader(Faulty(40, what, at=(3,)), workers=2)
    message = str(until_it_fails(stream))
    assert re.search(rf"data worker [01] \(pid \d+\) {words}", message), message
    assert "example 3" in message and "\n" not in message


def test_44_a_worker_killed_from_outside():
    stream = loader(Pictures(40), workers=2)
    next(stream)
    pids = workers_of(stream)
    os.kill(pids[1], signal.SIGKILL)
    wait_for(lambda: is_gone(pids[1]))
    message = str(until_it_fails(stream))
    assert f"data worker 1 (pid {pids[1]}) was killed by signal 9" in message
    wait_for(lambda: is_gone(pids[0]))  # none is left behind


def test_44_a_healthy_worker_at_an_earlier_row_takes_no_blame():
    """The dead one gets more chunks meanwhile, and its death is asked for with each."""
    stream = loader(Pictures(40))
    first, _, _, fatal, *_ = next(stream)["index"].tolist()
    stream.close()
    stream = loader(Faulty(40, "die_after_a_slow_one", at=(first, fatal)), workers=2)
    message = str(until_it_fails(stream))
    assert re.search(r"data worker [01] \(pid \d+\) was killed by signal 9", message), message
    assert f"example {fatal} of the data" in message


def test_44_workers_load_no_jax(tmp_path):
    """A second JAX would take the accelerator, or memory."""
    source = BenchPictures(tmp_path, 2)  # of `uta-jax data bench`
    job = Modules(TrainExamples(source, 0, 8, (0.4, 1), (0.7, 1.4), True))
    crew = Crew(job, (1, 8, 8, 3), workers=1, threads=0, timeout_s=30)
    ((_, (modules,)),) = crew.run([[(0, 0)]])
    crew.stop()
    crew.close()
    assert "uta_jax.data.pictures" in modules
    assert not {"jax", "grain", "torch", "tensorflow"} & set(modules)


def test_44_workers_end_with_a_trainer_that_is_killed():
    done = start_training("print(*workers_of(stream), flush=True); time.sleep(60)")
    pids = [int(pid) for pid in done.stdout.readline().split()]
    assert len(pids) == 2 and not any(map(is_gone, pids))
    done.kill()
    done.communicate()
    wait_for(lambda: all(map(is_gone, pids)))


def test_45_too_little_shared_memory_is_said_at_the_start():
    """A limit on the size of files holds for memory without a name, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        stream = loader(Pictures(40), workers=1, image_size=256)
        message = str(until_it_fails(stream))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "needs 4.5 MB of shared memory: File too large" in message
    assert "data.batch_size" in message and "data.workers=0" in message


SMALL_DISKS = "mount -t tmpfs -o size=1M none /dev/shm && mount -t tmpfs -o ro,size=4k none /tmp"
FULL = "mount -o remount,rw /tmp && ! head -c 9999 /dev/zero 2>/dev/null > /tmp/full"


def test_45_49_a_small_dev_shm_and_a_read_only_or_full_tmp_do_not_matter():
    if subprocess.run(["unshare", "-rm", "sh", "-c", SMALL_DISKS], capture_output=True).returncode:
        pytest.skip("no mounts of our own here")
    if any(Path(place).resolve().is_relative_to("/tmp") for place in (sys.prefix, TESTS)):
        pytest.skip("the interpreter or the package lies in /tmp, which the test hides")
    check = (
        "import errno, os, tempfile; assert os.statvfs('/dev/shm').f_blocks * 4096 == 2**20\n"
        "try:\n    open('/tmp/file', 'w')\n    sys.exit('it can be written')\n"
        "except OSError as e:\n    assert e.errno == errno.EROFS\n"
        "size = 3 * 8 * 256**2 * 3; assert size > 2**20\n"
    )
    body = f"""
        print(sum(len(next(stream)['image']) for _ in range(9)))
        subprocess.run({FULL!r}, shell=True, check=True)
        stream.close()
        stream = loader(Pictures(40), workers=2, image_size=256)
        print(sum(len(next(stream)['image']) for _ in range(9)))
    """
    take = check + program(body, size=256)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{SMALL_DISKS} && exec "$@"', "-", sys.executable, "-c",
         take],
        env=environment(), cwd=TESTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "72\n72\n", done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_46_an_exception_keeps_its_traceback_and_names_the_example(workers):
    stream = loader(Faulty(40, "fail", at=(3,)), workers=workers)
    error = until_it_fails(stream, kind=RuntimeError)
    assert re.search("example 3 of the data, position.*: ValueError: three is not five", str(error))
    trace = str(error.__cause__) if workers else repr(error.__cause__.__traceback__.tb_next)
    assert isinstance(error.__cause__, Exception)
    assert not workers or "in fail" in trace and "ValueError: three is not five" in trace


def test_47_workers_ignore_sigterm_and_sigint_so_that_the_trainer_can_save():
    body = """
        stopped = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: stopped.append(number))
        print(*workers_of(stream), flush=True)
        while len(stopped) < 2:
            next(stream)
        for _ in range(20):
            next(stream)
        print('saved', stopped, flush=True)
    """
    done = start_training(body)
    pids = [int(pid) for pid in done.stdout.readline().split()]
    assert all(os.getpgid(pid) == done.pid for pid in pids)  # the signal does reach them
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(done.pid, number)
        time.sleep(0.2)
    out, err = done.communicate(timeout=30)
    assert out == "saved [15, 2]\n" and done.returncode == 0, err
    wait_for(lambda: all(map(is_gone, pids)))


@pytest.fixture
def few_files():
    """A limit on open files near 64, as of `ulimit -n 64`: pytest itself has some open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(64, len(os.listdir("/proc/self/fd")) + 24)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_48_few_open_files_are_enough_for_many_shards(few_files, tmp_path):
    source = TarSource(write_tars(tmp_path, shards=few_files + 6, examples=1))
    for workers in (0, 2):
        stream = loader(source, workers=workers)
        ids = np.concatenate([next(stream)["index"] for _ in range(10)])
        assert len(set(ids)) > few_files
        stream.close()


def test_48_or_the_message_says_that_they_are_too_few(few_files, tmp_path):
    message = str(until_it_fails(loader(Pictures(40), workers=40)))
    assert "data.workers=40: Too many open files; lower data.workers" in message
    assert "ulimit -n" in message
    # Readers of ArrayRecord files stay open.
    source = ArrayRecordSource(write_record_files(tmp_path, files=few_files + 6, examples=1))
    message = str(until_it_fails(loader(source)))
    assert "Too many open files" in message and "ulimit -n" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_50_a_clock_that_runs_backwards_changes_nothing(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", time.time)  # put right again afterwards
    streams = [loader(Pictures(40))]
    source = Faulty(40, "turn_back_the_clock", at=range(40), beside=tmp_path / "turned")
    streams.append(loader(source, workers=workers, timeout_s=20))
    for _ in range(12):
        one, other = map(next, streams)
        assert np.array_equal(one["image"], other["image"])
    for stream in streams:
        stream.close()
    assert (tmp_path / "turned").read_text() == "True"


# A trainer of its own


def environment():
    path = (TESTS.parent, TESTS, Path(__file__).parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}


def program(body, size=8):
    """The text of a script that has a stream of batches, without the guard of __main__."""
    return (
        "import signal, sys, time\nfrom test_workers import *\n"
        f"stream = loader(Pictures(40), workers=2, image_size={size})\nnext(stream)\n"
        + textwrap.dedent(body).strip()
        + "\nstream.close()\n"
    )


def start_training(body):
    return subprocess.Popen(
        [sys.executable, "-c", program(body)], env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
