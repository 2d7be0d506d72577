"""What disks, other programs and users do to checkpoints: each is noticed, and something is left.

Rows of the list of faults: 51-69.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_state import DATA, RECIPE, TASK, VISION, on, save, state_at

from uta_jax import UserError, mesh
from uta_jax.checkpoint import Checkpoints, folder, load_params, manifest, store, tools
from uta_jax.checkpoint.lock import Lock
from uta_jax.checkpoint.store import SaveError

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(workdir, keep=10) as checkpoints:
        checkpoints.open(state_at(0, on(1, 1)))
        save(checkpoints, 1, 2, 3)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A workdir with the checkpoints 1, 2 and 3."""
    return shutil.copytree(saved, tmp_path / "run")


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def files(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


# What kills leave


def test_51_what_a_kill_leaves_behind_is_removed_and_nothing_else(run):
    checkpoints = run / "checkpoints"
    for name in ("4.orbax-checkpoint-tmp", "5.deleting", "5.mine", "final.orbax-checkpoint-tmp"):
        shutil.copytree(checkpoints / "3", checkpoints / name)
    with Checkpoints(run) as store:
        store.open(state_at(0, on(1, 1)))
    assert names(run) == ["1", "2", "3", "5.mine", "final.orbax-checkpoint-tmp"]


# Disks

FULL = f"""
import os, sys, shutil
from pathlib import Path
from small_state import *
from uta_jax.checkpoint import manifest
from uta_jax.checkpoint.store import SaveError
run, filler = Path("/mnt/run"), Path("/mnt/filler")
checkpoints = Checkpoints(run, keep=2)
checkpoints.open(state_at(0, on(1, 1)))
save(checkpoints, 1)
def attempt(step):
    try:
        save(checkpoints, step)
        sys.exit("it was saved")
    except SaveError as error:
        print(error)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["1"], step
    assert not manifest.verify(checkpoints.directory / "1")[0]
try:
    with filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
except OSError as error:
    assert error.errno == {errno.ENOSPC}
attempt(2)
try:
    Checkpoints(run).open(state_at(0, on(1, 1)))
    sys.exit("no room was not noticed")
except SaveError:
    raise
except UserError as error:
    print(error)
filler.unlink()
save(checkpoints, 3)
shutil.rmtree(checkpoints.directory / "3")
assert not os.system("mount -o remount,ro /mnt")
attempt(4)
"""


def in_small_disk(script):
    """Run with a disk of 4 MB of its own at /mnt; needs no rights but those of a user."""
    mount = 'mount -t tmpfs -o size=4M none /mnt && exec "$@"'
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "-", sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_53_55_a_full_or_read_only_disk_is_reported_with_advice_and_loses_nothing():
    done = in_small_disk("from uta_jax import UserError\n" + FULL)
    assert done.returncode == 0, done.stderr
    full, no_room, read_only = done.stdout.splitlines()
    assert "checkpoint 2 of /mnt/run was not saved: the disk is full; make room" in full
    assert "that of step 1 stands" in full
    assert "GB are free, config.train.keep=2 needs" in no_room
    assert "checkpoint 4 of /mnt/run was not saved: the disk is read-only" in read_only


LIMITED = """
import os, resource, sys
from pathlib import Path
from small_state import *
from uta_jax.checkpoint import folder
from uta_jax.checkpoint.store import SaveError
checkpoints, before = Checkpoints(Path(sys.argv[1])), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
try:
    save(checkpoints, 4)
except SaveError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print(error)
print(sorted(os.listdir(checkpoints.directory)))
save(checkpoints, 5)
print(folder.newest_good(checkpoints.directory)[0], flush=True)
os._exit(0)
"""


def test_54_a_limit_on_the_size_of_files(run):
    """In a process of its own: what orbax has begun and left would be warned of in this one."""
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run)], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    error, left, newest = done.stdout.splitlines()
    assert "checkpoint 4 of" in error and "see `ulimit -f`" in error and "step 3 stands" in error
    assert left == "['1', '2', '3']" and newest == "5" and SaveError.exit_code == 4


def test_54_an_error_of_the_disk_is_raised_by_the_poll_of_a_later_step(run, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(manifest, "write", fail)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(state_at(4, on(1, 1)), DATA, {})
        checkpoints._saving.exception()  # waits for it
        with pytest.raises(SaveError, match="the disk fails.*that of step 3 stands"):
            checkpoints.poll()
        checkpoints.poll()  # it is told once
    assert folder.acknowledged(run / "checkpoints") == [1, 2, 3]  # none went for the bad one


def test_56_a_directory_that_was_removed_while_the_run_was_on(run):
    with Checkpoints(run) as checkpoints:
        shutil.rmtree(run)
        with pytest.raises(SaveError, match="was removed while the run was on"):
            save(checkpoints, 4)


# Contents


def test_57_one_flipped_bit_in_any_file_is_found(run):
    step, rng = run / "checkpoints" / "3", random.Random(0)
    assert len(files(step)) > 20
    for file in files(step):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        problems, _ = manifest.verify(step)
        assert problems and (file.name in problems[0]), file
        file.write_bytes(whole)
    assert not manifest.verify(step)[0]


def test_57_63_the_run_falls_back_says_so_and_saves_again(run, capsys):
    array = max(files(run / "checkpoints" / "3" / "params"), key=lambda p: p.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 4
    array.write_bytes(content)
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.open(state_at(0, on(1, 1)))
        assert checkpoints.find() == 2
        said = capsys.readouterr().err
        name = array.relative_to(run / "checkpoints" / "3")
        assert f"CHECKPOINT 3 IS DAMAGED: {name}: its content is not what was written" in said
        assert "checkpoints/quarantine/3-damaged" in said
        state, meta = checkpoints.restore(RECIPE, on(1, 1), 2)
        assert_equal(mesh.fetch(state), mesh.fetch(state_at(2, on(1, 1))))
        assert meta["step"] == 2 and meta["data"] == DATA
        expected = save(checkpoints, 3)[3]  # the step that was bad, again
        assert checkpoints.find() == 3
        assert_equal(mesh.fetch(checkpoints.restore(RECIPE, on(1, 1))[0]), expected)
    assert names(run) == ["2", "3", "quarantine"]
    assert len(files(run / "checkpoints/quarantine/3-damaged")) > 20


@pytest.mark.parametrize("how", ["cut", "gone", "zeros", "longer", "alien"])
def test_58_a_file_that_is_cut_gone_or_empty_is_named(run, how):
    step = run / "checkpoints" / "3"
    file = max(files(step / "opt"), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "alien":
        file.with_name("stranger").write_bytes(b"")
    else:
        changed = {"cut": content[:-1], "zeros": bytes(len(content)), "longer": content + b"0"}
        file.write_bytes(changed[how])
    (line,) = manifest.verify(step)[0]
    name = file.name if how != "alien" else "stranger"
    words = {"gone": "is missing", "zeros": "its content", "alien": "was not there"}
    assert f"{name}" in line and words.get(how, f"written were {len(content)}") in line


def test_59_62_what_is_no_checkpoint_is_passed_by_or_moved_aside(run, capsys):
    checkpoints = run / "checkpoints"
    (checkpoints / "7").mkdir()
    (checkpoints / "9").write_text("a file")
    (checkpoints / "final").mkdir()
    (checkpoints / "007").mkdir()
    shutil.copytree(checkpoints / "3", checkpoints / "8")
    (checkpoints / "8" / manifest.NAME).unlink()
    assert folder.newest_good(checkpoints)[0] == 3  # another process may be writing 7 and 8
    with Checkpoints(run) as store:
        assert store.latest() == 3 and store.find() == 3
    said = capsys.readouterr().err
    assert "CHECKPOINT 7 IS INCOMPLETE" in said and "CHECKPOINT 8 IS INCOMPLETE" in said
    assert names(run) == ["007", "1", "2", "3", "9", "final", "quarantine"]
    assert not folder.damaged(checkpoints)  # nothing was lost that was acknowledged


def test_old_checkpoints_go_only_after_a_new_one_is_acknowledged(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1, keep_every=2) as checkpoints:
        checkpoints.open(state_at(0, on(1, 1)))
        save(checkpoints, 1)
        seen, write = [], manifest.write
        monkeypatch.setattr(
            manifest, "write", lambda path: seen.append(names(tmp_path)) or write(path)
        )
        save(checkpoints, 2, 3, 4, 5)
        assert seen[0] == ["1", "2"] and names(tmp_path) == ["2", "4", "5"]


def test_a_save_under_way_is_of_the_state_as_it_was(run, monkeypatch):
    write, go_on = Checkpoints._write, threading.Event()
    monkeypatch.setattr(Checkpoints, "_write", lambda *args: go_on.wait() and write(*args))
    with Checkpoints(run) as checkpoints:
        state = state_at(4, on(1, 2))
        expected = jax.tree.map(np.array, mesh.fetch(state))
        checkpoints.save(state, DATA, {"teacher": {"sha256": "00"}})
        assert not (run / "checkpoints" / "4").exists()
        jax.tree.map(lambda leaf: leaf.delete(), state)  # as the next update does
        go_on.set()  # and reading waits for it
        assert_equal(mesh.fetch(checkpoints.restore(RECIPE, on(1, 1), 4)[0]), expected)


@pytest.mark.parametrize("awaited", [True, False])
def test_a_save_that_is_awaited_counts_when_the_loop_goes_on(run, monkeypatch, awaited):
    """``train.save_async=False``: a kill at any later moment finds it."""
    write, go_on = Checkpoints._write, threading.Event()
    monkeypatch.setattr(Checkpoints, "_write", lambda *args: go_on.wait() and write(*args))
    with Checkpoints(run, awaited=awaited) as checkpoints:
        state = state_at(4, on(1, 1))
        if awaited:
            threading.Timer(0.3, go_on.set).start()
        checkpoints.save(state, DATA, {})
        assert checkpoints.latest() == (4 if awaited else 3)
        go_on.set()


# Two runs


def test_64_a_second_run_is_refused_by_the_name_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("uta_jax.checkpoint.lock._PATIENCE", 0.2)
    script = (
        "import sys, time; from pathlib import Path; from uta_jax.checkpoint.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+ since 20"):
        Lock(tmp_path)
    holder.send_signal(signal.SIGKILL)  # it cannot clean up
    holder.communicate()
    Lock(tmp_path).close()
    Lock(tmp_path).close()


# Other devices, models and releases


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 2), (1, 8)])
def test_65_the_same_values_on_any_number_of_devices(run, shape):
    with Checkpoints(run) as checkpoints:
        state, _ = checkpoints.restore(RECIPE, on(*shape))
    assert_equal(mesh.fetch(state), mesh.fetch(state_at(3, on(1, 1))))
    kernel = state.ema["vision"]["blocks"]["mlp"]["up"]["kernel"]
    assert len({s.device for s in kernel.addressable_shards}) == shape[0] * shape[1]
    assert kernel.addressable_shards[0].data.shape == (1, 8 // shape[1], 16)


def test_65_three_devices_name_the_axis_that_does_not_divide(run):
    with Checkpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"mesh.fsdp=3 does not divide axis 1 \(8\) of"):
            checkpoints.restore(RECIPE, on(1, 3))
        state, _ = checkpoints.restore(RECIPE, on(3, 1))  # whole copies fit any number
    assert_equal(mesh.fetch(state.params), mesh.fetch(state_at(3, on(1, 1)).params))


def test_65_parameters_alone_need_no_configuration(run):
    expected = mesh.fetch(state_at(2, on(1, 1)))
    for path in (run, run / "checkpoints", run / "checkpoints" / "2"):
        assert_equal(load_params(path, step=2), expected.params)
    assert_equal(load_params(run, "ema", 2), expected.ema)
    with pytest.raises(UserError, match="no checkpoint 4"):
        load_params(run, step=4)
    with pytest.raises(UserError, match="holds no 'student'"):
        load_params(run, "student")


def test_66_another_model_is_refused_by_the_paths_that_differ(run):
    deeper = replace(RECIPE, task=replace(TASK, student=replace(VISION, mlp_hidden=24)))
    with Checkpoints(run) as checkpoints:
        with pytest.raises(
            UserError, match=r"params/vision/blocks/mlp/\S+: float32\[1, 16\] saved, float32\[1, 24"
        ):
            checkpoints.restore(deeper, on(1, 1))
        with pytest.raises(UserError, match="ema/.*: .* saved, None wanted|does not fit") as error:
            checkpoints.restore(replace(RECIPE, ema_decay=0.0), on(1, 1))
            raise UserError("does not fit")
        assert error
        meta = state_at(3, on(1, 1))
        half = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), meta.params)
        checkpoints.save(meta.replace(step=jax.numpy.int32(4), params=half), DATA, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=r"params/\S+: bfloat16\[.* saved, float32\["):
            checkpoints.restore(RECIPE, on(1, 1))


def test_67_a_checkpoint_of_the_first_format_is_read(tmp_path):
    with tarfile.open(GOLDEN / "checkpoint_format_1.tar.gz") as archive:
        # The archive is our own, and Python before 3.11.4 knows no filter.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safe)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find() == 7
        state, meta = checkpoints.restore(RECIPE, on(1, 2))
    assert meta["format"] == 1 and meta["version"] == "0.1.0" and meta["data"] == DATA
    # Written out at the time, without this package: what the arrays must be.
    with np.load(GOLDEN / "checkpoint_format_1.npz") as expected:
        found = jax.tree.leaves_with_path(mesh.fetch(state))
        assert len(found) == len(expected.files) > 50
        for path, leaf in found:
            np.testing.assert_array_equal(leaf, expected[mesh.path_name(path)])


def test_68_a_checkpoint_of_a_later_release_is_refused_with_its_version(run, monkeypatch):
    with Checkpoints(run) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(store, "FORMAT", 99)
            patch.setattr(store, "__version__", "7.8.9")
            save(checkpoints, 4)
        with pytest.raises(UserError, match=r"written by uta-jax 7.8.9 \(format 99\)"):
            checkpoints.restore(RECIPE, on(1, 1))


def test_69_a_copy_verifies_and_half_a_copy_is_named(run, tmp_path):
    subprocess.run(["cp", "-r", str(run), str(tmp_path / "copy")], check=True)
    lines, good = tools.verify(tmp_path / "copy")
    assert good and len(lines) == 3
    file = files(tmp_path / "copy" / "checkpoints" / "2" / "ema")[3]
    file.unlink()
    lines, good = tools.verify(tmp_path / "copy")
    assert not good and any(file.name in line and "is missing" in line for line in lines)
    shutil.rmtree(tmp_path / "copy")
    assert tools.copy(run, tmp_path / "copy") == tmp_path / "copy" / "checkpoints" / "3"
    assert tools.verify(tmp_path / "copy")[1]
    with pytest.raises(UserError, match="is there already"):
        tools.copy(run, tmp_path / "copy")
    files(run / "checkpoints" / "2")[-1].write_bytes(b"")
    with pytest.raises(UserError, match="2 is damaged"):
        tools.copy(run, tmp_path / "copy", 2)
    assert names(tmp_path / "copy") == ["3"]
    assert len(tools.listing(run)) == 3
