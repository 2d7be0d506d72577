"""A run that is killed or told to stop, again and again, ends as if nothing had befallen it.

Rows of the list of faults: 47, 51, 52, 70-72, and `resume` of 82. `make faults` kills more often,
and runs of two processes, too.
"""

import re
import signal
from dataclasses import dataclass

import harness
import pytest

from uta_jax import UserError, metrics
from uta_jax import train as training
from uta_jax.checkpoint import folder
from uta_jax.config_files import read_config

pytestmark = pytest.mark.slow
FAULTS = (
    "save.committed:kill",  # at step 3
    "compile:term",  # it is known one update late, and so at step 2
    "step:int:2",  # at step 4, so that 5 is the last
    "save.commit:group",  # in the background, so somewhere from 6 to 9; the data worker, too
    "delete.half:kill",  # when the next is saved
    "eval:term",  # after step 12
)


@dataclass
class Life:
    """One process of the run."""

    fault: str
    code: int
    out: str
    error: str
    seconds: float  # from before its start until after its end
    end_s: float  # from its last note of the time until after its end
    saved: list[int]  # steps acknowledged when it had ended
    wrong: int  # arrays in them that are not as they should be


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """With the run that nothing befell to compare with."""
    return harness.Trial(tmp_path_factory.mktemp("runs"), 1)


@pytest.fixture(scope="module")
def workdir(trial):
    return trial.base / "struck"


@pytest.fixture(scope="module")
def lives(trial, workdir):
    """One run: each life but the last ends by a fault."""
    found = []
    for fault in (*FAULTS, ""):
        done = trial.start(workdir, fault)
        out, error = done.wait()
        saved, wrong = trial.check_saved(workdir, fault)
        end_s = done.ended - (workdir / "seconds").stat().st_mtime
        found.append(Life(fault, *done.codes(), out, error, done.seconds, end_s, saved, wrong))
    return dict(zip((*FAULTS, ""), found, strict=True))


def test_51_52_70_72_every_life_goes_on_from_what_was_saved_last(lives):
    before = 0
    for life in lives.values():
        start = f"RESUMED at step {before} of" if before else "FRESH START"
        assert start in life.out, life
        assert not life.fault or "COMPILED" not in life.out or "found in" in life.out  # R12
        before = max(life.saved, default=0)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "kill" in fault])
def test_51_52_a_killed_life_leaves_only_what_verifies(lives, fault):
    life = lives[fault]
    assert life.code == -signal.SIGKILL and "UTA_FAULT: kill at" in life.error  # it did happen
    assert not life.wrong and len(life.saved) == (0 if fault.startswith("save") else 2)


@pytest.mark.parametrize(
    "fault, step",
    [("compile:term", 2), ("step:int:2", 5), ("save.commit:group", None), ("eval:term", 12)],
)
def test_47_70_72_a_signal_anywhere_saves_once(lives, fault, step):
    life, action = lives[fault], fault.split(":")[1]
    assert f"UTA_FAULT: {action} at" in life.error  # it did happen
    name = "SIGINT" if action == "int" else "SIGTERM"
    assert life.code == 75, life
    saved = max(life.saved)
    last = life.error.strip().splitlines()[-1]
    words = rf"stopped by {name} after saving step {saved}, \d+\.\d s after"
    assert re.search(words, last)
    assert step is None or step == saved
    assert not life.wrong


def test_the_end_is_that_of_the_run_that_was_left_alone(trial, workdir, lives):
    assert trial.check_end(workdir, [lives[""].code], lives[""].error) == 0
    assert not trial.failures


def test_the_ledger_is_what_a_clock_outside_says(workdir, lives):
    """R10: also of processes that were killed; what they did in vain is lost.

    But the interpreter's own end, about half a second, comes when nothing can be noted any more.
    """
    row = [row for row in metrics.read(workdir / "metrics.jsonl") if "seconds/init" in row][-1]
    phases = {name: value for name, value in row.items() if name.startswith("seconds/")}
    assert row["ended"] == "complete" and all(value > 0 for value in phases.values())
    for life in lives.values():
        assert life.end_s < (1 if "kill" in life.fault else 5)
    outside = sum(life.seconds - life.end_s for life in lives.values())
    kept = float((workdir / "seconds").read_text())
    assert kept == pytest.approx(outside, rel=0.01)
    assert 0 <= kept - sum(phases.values()) < 2  # closing what was open, after the last row
    # The first life saved nothing: all of it is lost.
    killed = [life.seconds for fault, life in lives.items() if "kill" in fault]
    assert 0.97 * killed[0] < phases["seconds/lost"] < sum(killed)


def test_71_the_second_signal_ends_at_once(trial):
    done = trial.start(trial.base / "twice", "step:twice:1")
    _, error = done.wait()
    assert done.codes() == [128 + signal.SIGTERM]
    assert "SIGTERM again: ending at once, unsaved" in error
    assert not folder.acknowledged(trial.base / "twice" / "checkpoints")


def test_82_resume_must_and_never_are_kept_to(trial, tmp_path):
    tiny = str(harness.HERE / "tiny.py")
    with pytest.raises(UserError, match="config.train.resume=must, but"):
        training.train(read_config(tiny, ["--config.train.resume=must"]), tmp_path)
    with pytest.raises(UserError, match="has a checkpoint of step 12"):
        never = read_config(tiny, ["--config.train.resume=never"])
        training.train(never, trial.base / "whole")
