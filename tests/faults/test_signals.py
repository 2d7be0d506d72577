"""A run that is told to stop saves, ends with its own exit code, and goes on when started again.

Rows of the list of faults: 47, 70-72, and `resume` of 82.
"""

import random
import re
import signal

import harness
import pytest

from uta_jax.checkpoint import folder


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """With the run that nothing befell to compare with."""
    return harness.Trial(tmp_path_factory.mktemp("signals"), 1, random.Random(0))


@pytest.mark.parametrize(
    "fault, step",
    [
        ("compile:term", 2),  # it is known one update late
        ("step:int:3", 4),
        ("eval:term", 4),
        ("save.commit:term", None),  # in the background, whenever that is
    ],
)
def test_70_72_a_signal_anywhere_saves_once_and_the_run_goes_on(trial, fault, step):
    workdir = trial.base / re.sub(r"\W", "-", fault)
    done = trial.start(workdir, fault)
    out, error = done.wait()
    action = fault.split(":")[1]
    assert f"UTA_FAULT: {action} at" in error  # it did happen
    assert done.codes() == [75], out + error
    last = error.strip().splitlines()[-1]
    assert re.search(
        rf"stopped by SIG{action.upper()} after saving step \d+, \d+\.\d s after", last
    )
    saved = max(folder.acknowledged(workdir / "checkpoints"))
    assert f"saving step {saved}," in last and (step is None or step == saved)
    trial.check_saved(workdir, fault)
    resumed = trial.start(workdir)
    out, error = resumed.wait()
    assert f"RESUMED at step {saved} of" in out and "found in" in out + error  # the cache of R12
    trial.check_end(workdir, resumed.codes(), out + error)
    assert not trial.tally.notes
    check_times(workdir)


def check_times(workdir):
    """The ledger of a run that was stopped well: nothing is lost, and nothing is missing."""
    rows = [r for r in harness.metrics.read(workdir / "metrics.jsonl") if "seconds/init" in r]
    phases = {name: value for name, value in rows[-1].items() if name.startswith("seconds/")}
    assert rows[-1]["ended"] == "complete" and phases["seconds/lost"] == 0
    assert all(value > 0 for name, value in phases.items() if name != "seconds/lost")


def test_71_the_second_signal_ends_at_once(trial):
    done = trial.start(trial.base / "twice", "step:twice:3")
    _, error = done.wait()
    assert done.codes() == [128 + signal.SIGTERM]
    assert "SIGTERM again: ending at once, unsaved" in error


def test_82_resume_must_and_never_are_kept_to(trial):
    must = trial.start(trial.base / "new", extra=["--config.train.resume=must"])
    _, error = must.wait()
    assert must.codes() == [2] and "config.train.resume=must, but" in error
    never = trial.start(trial.base / "whole", extra=["--config.train.resume=never"])
    _, error = never.wait()
    assert never.codes() == [2] and "has a checkpoint of step 8" in error
