"""The whole of a run in several processes: one start of four, and the commands in two."""

import json
import re

import numpy as np
import pytest
from several import FAULTS, ROOT, Job

from uta_jax import metrics
from uta_jax.checkpoint import folder, load_params, manifest
from uta_jax.evals import is_scored
from uta_jax.interop.teacher import load_clip
from uta_jax.report import report

pytestmark = pytest.mark.slow
TINY = str(FAULTS / "tiny.py")
LOOP = str(ROOT / "tests" / "whole_loop.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders beside each other share compilations."""
    return tmp_path_factory.mktemp("several")


def scored_steps(workdir):
    return [row["step"] for row in metrics.read(workdir / "metrics.jsonl") if is_scored(row)]


def logged_steps(workdir):
    return [row["step"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row]


def check_whole(workdir, job, step):
    """What stands in the workdir once ``whole_loop.py`` is through, and what each was told."""
    count = len(job.processes)
    assert job.codes() == [0] * count, job.all()
    told = [json.loads(job.out(number).splitlines()[-1]) for number in range(count)]
    clocks = {"seconds", "images_per_s", "data_wait_ms"}
    trained = [{k: v for k, v in one["trained"].items() if k not in clocks} for one in told]
    assert trained == [trained[0]] * count and np.isfinite(list(trained[0].values())).all()
    assert [one["found"] for one in told] == [told[0]["found"]] * count
    # The rows are one process's, and the figures of evaluate those of the training's last one.
    rows = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, step + 1)]
    scores = {row["step"]: row["zeroshot/top5"] for row in rows if is_scored(row)}
    assert list(scores) == [step // 2, step]
    found = json.loads((workdir / "evaluate.json").read_text())
    assert found == told[0]["found"] and found["step"] == step
    assert found["zeroshot"]["student"]["top5"] == scores[step]
    assert found["zeroshot"]["student"]["n"] == 16  # every image once
    check_saved(workdir, step)
    return rows


def check_saved(workdir, step):
    """The last checkpoint is whole, and what was exported is its average of the parameters."""
    assert max(folder.acknowledged(workdir / "checkpoints")) == step
    assert manifest.verify(workdir / "checkpoints" / str(step))[0] == []
    exported = load_clip(workdir / "exported").params["vision"]["patch_embed"]["kernel"]
    saved = load_params(workdir, "ema")["vision"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(exported, saved)


def check_quiet(job):
    """Only the first process says what all do."""
    for number in range(1, len(job.processes)):
        said = [x for x in job.out(number).splitlines() if not x.startswith(("[Gloo]", "{"))]
        assert said == [] and job.err(number) == "", job.all()


def test_four_processes_train_evaluate_save_and_export(base):
    """Two shards of the parameters, two of them with the same."""
    workdir = base / "run4"
    argv = (
        TINY, str(workdir), "--config.data.workers=0", "--config.mesh.fsdp=2",
        "--config.train.steps=20", "--config.train.save_every=10", "--config.train.eval_every=10",
    )  # fmt: skip
    with Job(base / "four", LOOP, *argv, count=4) as job:
        rows = check_whole(workdir, job, 20)
        check_quiet(job)
        assert re.search(r"^3 .* 1 x cpu +1-1 +1-1 +0-0$", job.out(0), re.MULTILINE)  # its place
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.1


def test_two_processes_stop_together_go_on_and_are_measured(base):
    """By a signal to one of them (R4); then the commands, in two processes and in this one."""
    workdir = base / "run2"
    one_told = {1: {"UTA_FAULT": "step:term:3"}}
    short = ("--config.train.steps=8", "--config.train.save_every=8", "--config.train.eval_every=4")
    argv = ("-m", "uta_jax", "train", f"--config={TINY}", f"--workdir={workdir}", *short)
    with Job(base / "stopped", *argv, each=one_told) as job:
        job.wait_for("UTA_FAULT: term at step", 1)
        assert job.codes(60) == [75, 75], job.all()
        (step,) = folder.acknowledged(workdir / "checkpoints")
        assert 3 <= step <= 4 and manifest.verify(workdir / "checkpoints" / str(step))[0] == []
        for number, name in enumerate(("a signal at another process", "SIGTERM")):
            assert f"stopped by {name} after saving step {step}" in job.last_line(number)
    argv = (LOOP, TINY, str(workdir), *short, "--config.train.panels=4")
    with Job(base / "resumed", *argv) as job:
        check_whole(workdir, job, 8)
        boards = [path.read_bytes() for path in workdir.glob("events.out.tfevents.*")]
        assert any(b"pictures" in board for board in boards)
        assert f"RESUMED at step {step} of 8" in job.out(0)
        check_quiet(job)
    names = ("alignment", "knn")
    argv = ("-m", "uta_jax", "evaluate", f"--workdir={workdir}", "--eval", *names)
    with Job(base / "evaluated", *argv, f"--json={base / 'two.json'}") as job:
        assert job.codes() == [0, 0], job.all()
        assert "alignment" in job.out(0)
        check_quiet(job)
    assert json.loads((base / "two.json").read_text()).keys() == {"step", *names}
    kept = json.loads((workdir / "evaluate.json").read_text())
    assert kept.keys() == {"step", "zeroshot", *names}
    (summary,) = report([workdir]).values()
    assert summary["student_top1"] == kept["zeroshot"]["student"]["top1"]
