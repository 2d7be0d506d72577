"""The whole way: train, interrupt, resume, evaluate, export, report."""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from uta_jax import UserError, metrics
from uta_jax import train as training
from uta_jax.checkpoint import Checkpoints, load_params, load_run
from uta_jax.config import default_config
from uta_jax.evals import evaluate
from uta_jax.interop.teacher import load_clip
from uta_jax.publish import export_run
from uta_jax.report import report
from uta_jax.runlog import NotFinite

STEPS = 6


@pytest.fixture
def config(scenes, teacher_dir, monkeypatch):
    """The demo's recipe, shrunk: 6 steps of 16 images, saved after each, on two devices.

    Eight devices, which share a few threads, have been seen to wait for each other for ever beside
    the loader's threads; ``test_step.py`` is where eight are tried.
    """
    make_mesh = training.meshes.make_mesh
    two = jax.devices()[:2]
    monkeypatch.setattr(training.meshes, "make_mesh", lambda **_: make_mesh(1, 2, devices=two))
    c = default_config()
    c.student.preset, c.student.dtype = "tiny_clip", "float32"
    c.teacher.path, c.teacher.dtype = str(teacher_dir), "float32"
    c.data.path = c.eval.path = str(scenes)
    c.data.batch_size, c.eval.batch_size = 16, 64
    c.optim.ema_decay = 0.9
    c.train.steps, c.train.log_every, c.train.save_every, c.train.keep = STEPS, 1, 1, 10
    return c


class _Interrupted(Exception):
    pass


def _interrupt_after(monkeypatch, step):
    """Die when update ``step`` + 1 is about to be dispatched."""
    original = training.Log.dispatched

    def dispatched(self, done, *args):
        if done > step:
            raise _Interrupted
        original(self, done, *args)

    monkeypatch.setattr(training.Log, "dispatched", dispatched)


def _state(config, workdir):
    with open(workdir / "config.json") as file:
        assert json.load(file) == json.loads(json.dumps(config.to_dict()))
    run = load_run(workdir)
    assert run.meta["step"] == STEPS
    checkpoints = Checkpoints(workdir)
    recipe = training.configs.make_recipe(config, run.teacher.spec, 256)
    mesh = training.meshes.make_mesh(**config.mesh)
    state, _ = checkpoints.restore(recipe, mesh)
    checkpoints.close()
    return training.meshes.fetch(state)


def _rows(workdir):
    timed = ("images_per_s", "data_wait_ms", "data_wait_ms_by_step", "seconds")
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "ended" not in row]
    return [
        {k: v for k, v in row.items() if k not in timed and not k.startswith("seconds/")}
        for row in rows
    ]


def test_interrupted_again_and_again_is_the_uninterrupted_run(
    config, tmp_path, monkeypatch, capsys
):
    training.train(config, tmp_path / "whole")
    capsys.readouterr()
    workdir, before = tmp_path / "run", 0
    for stop in (1, 3, 5):
        with monkeypatch.context() as patch:
            _interrupt_after(patch, stop)
            with pytest.raises(_Interrupted):
                training.train(config, workdir)
        out = capsys.readouterr().out
        assert (f"RESUMED at step {before}" if before else "FRESH START") in out
        before = stop
    training.train(config, workdir)
    assert f"RESUMED at step {before}" in capsys.readouterr().out
    state = _state(config, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, _state(config, workdir), state)
    assert _rows(workdir) == _rows(tmp_path / "whole")
    # A cold start with the same parameters would not do: its moments are zero.
    assert any(leaf.any() for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)


def test_train_evaluate_export_report(config, tmp_path, teacher_dir, monkeypatch):
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    before = load_clip(teacher_dir)
    config.train.panels, config.train.eval_every = 2, 3
    drawn = []
    monkeypatch.setattr(
        training.Log, "pictured", lambda self, step, panel: drawn.append((step, panel))
    )
    figures = training.train(config, workdir)
    # Crop, what was seen, cosine, two kinds of features; at the start and with evaluations.
    assert [(step, panel.shape) for step, panel in drawn] == [
        (step, (5 * 68 - 4, 2 * 68 - 4, 3)) for step in (0, 3, 6)
    ]
    crops, later = [panel[: 2 * 68] for _, panel in drawn[:2]], drawn[2][1]
    assert np.array_equal(*crops) and not np.array_equal(later, drawn[0][1])
    assert {"loss", "images_per_s", "zeroshot/top1"} <= figures.keys()
    export_run(workdir, "hf", exported)
    scores = evaluate(workdir, exported=str(exported), json_file=str(tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    scores = scores["zeroshot"]
    assert scores["student"]["n"] == 128
    assert abs(scores["student"]["top1"] - scores["exported"]["top1"]) <= 1 / 128
    summary = report([workdir], json_file=workdir / "summary.json")
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["run"]["exported_top1"] == scores["exported"]["top1"]
    assert summary["run"]["train_seconds"] > 0 and summary["run"]["chance"] == 1 / 128
    assert (workdir / "report.html").read_text().count("<img") > 100
    # The exported text tower and scale are the teacher's own, bit for bit.
    after = load_clip(exported)
    jax.tree.map(np.testing.assert_array_equal, after.params["text"], before.params["text"])
    assert after.params["logit_scale"] == before.params["logit_scale"]


def test_resuming_refuses_other_data_and_another_teacher(config, tmp_path):
    workdir = tmp_path / "run"
    config.train.steps = 2
    training.train(config, workdir)
    saved = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    config.train.steps = 4
    config.seed = 1
    with pytest.raises(UserError, match="seed: 0 -> 1.*--allow_data_change"):
        training.train(config, workdir)
    config.seed, config.data.split = 0, "train[:50%]"
    with pytest.raises(UserError, match="fingerprint: .*examples: 256 -> 128"):
        training.train(config, workdir)
    config.data.split, config.student.preset = "train", "uta_tiny"
    with pytest.raises(UserError, match="does not fit"):
        training.train(config, workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == saved
    config.student.preset = "tiny_clip"
    training.train(config, workdir)  # and with the mistakes mended it goes on


def test_updates_that_are_not_finite_are_left_out_and_stop_the_run(
    config, tmp_path, monkeypatch, capsys
):
    """The loss is NaN where an example is in the batch, so also after a resume."""
    config.eval.path, config.train.max_bad_steps = "", 2
    loader = training.TrainLoader(
        training.configs.open_data(config.data), batch_size=16, seed=0, image_size=64,
        crop_scale=config.data.crop_scale,
    )  # fmt: skip
    seen = [np.asarray(next(loader)["index"]) for _ in range(STEPS)]
    loader.close()
    bad = [seen[step - 1][0] for step in (2, 4, 5)]
    uta = training.OBJECTIVES["uta"]

    def loss(params, frozen, batch, rng, task):
        value, figures = uta.loss(params, frozen, batch, rng, task)
        poison = jax.numpy.isin(batch["index"], np.asarray(bad)).any()
        return jax.numpy.where(poison, np.nan, value), figures

    monkeypatch.setitem(training.OBJECTIVES, "uta", replace(uta, loss=loss))
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)  # with one of two saved
        with pytest.raises(_Interrupted):
            training.train(config, tmp_path / "run")
    out = capsys.readouterr()
    assert "step 2: not finite: loss" in out.out + out.err
    with pytest.raises(NotFinite, match="step 5: .*2 in a row .*last good one is step 3, .*"):
        training.train(config, tmp_path / "run")
    capsys.readouterr()
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest() == 4
    params = [load_params(tmp_path / "run", step=step) for step in (1, 2, 3, 4)]
    equal = [_equal(*pair) for pair in itertools.pairwise(params)]
    assert equal == [True, False, True]
    assert [row["bad_steps"] for row in _rows(tmp_path / "run")] == [0, 1, 1, 2]
    assert NotFinite.exit_code == 3


def _equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_an_evaluation_lost_to_an_interruption_is_made_up(config, tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise _Interrupted

    config.train.steps = 2
    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "scored", lost)
        with pytest.raises(_Interrupted):
            training.train(config, tmp_path / "run")
    config.optim.end_lr = 0.0
    figures = training.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "zeroshot/top1" in figures and "RESUMED at step 2 of 2" in out
    assert "CHANGED from step 2 on: config.optim.end_lr: 1e-05 -> 0.0" in out
    assert sum("zeroshot/top1" in row for row in _rows(tmp_path / "run")) == 1
    assert training.train(config, tmp_path / "run") == {}  # nothing is owed any more


def _folder(root, scenes, bad):
    """The first 40 scenes as files, of which `bad` hold nothing."""
    from uta_jax.data.sources import open_source

    source = open_source("tfds", scenes, "train")
    root.mkdir()
    for n in range(40):
        (root / f"{n:02}.png").write_bytes(b"" if n in bad else source[n]["image"])
    return root


def test_bad_examples_are_counted_through_an_interruption(config, scenes, tmp_path, monkeypatch):
    config.data.source, config.data.split, config.eval.path = "folder", "", ""
    config.data.path = str(_folder(tmp_path / "images", scenes, bad=(3, 17)))
    config.data.workers = 1
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)
        with pytest.raises(_Interrupted):
            training.train(config, tmp_path / "run")
    training.train(config, tmp_path / "run")
    loader = training.TrainLoader(
        training.configs.open_data(config.data), batch_size=16, seed=0, image_size=64,
        crop_scale=config.data.crop_scale, bad_file=tmp_path / "expected.jsonl",
    )  # fmt: skip
    counts = [next(loader) and loader.bad_examples for _ in range(STEPS)]
    loader.close()
    lines = (tmp_path / "run" / "bad_examples.jsonl").read_text()
    assert lines == (tmp_path / "expected.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert {row["key"] for row in rows} == {"03.png", "17.png"}
    assert all("0 bytes" in row["reason"] for row in rows)
    assert [row["bad_examples"] for row in _rows(tmp_path / "run")] == counts and counts[-1] > 2


def test_made_up_data_and_other_data_where_that_is_allowed(config, tmp_path, capsys):
    config.data.source, config.data.path, config.data.split = "synthetic", "", ""
    config.eval.path, config.train.steps = "", 2
    training.train(config, tmp_path / "run")
    config.train.steps, config.data.split = 4, "other"
    with pytest.raises(UserError, match="split:  -> other"):
        training.train(config, tmp_path / "run")
    training.train(config, tmp_path / "run", allow_data_change=True)
    out = capsys.readouterr().out
    assert "DATA CHANGED: fingerprint: " in out and "goes on after 32 examples" in out
    assert load_run(tmp_path / "run").meta["data"]["examples_seen"] == 64
    rows = metrics.read(tmp_path / "run/metrics.jsonl")
    waits = [row["data_wait_ms_by_step"] for row in rows if "ended" not in row]
    assert [len(of_one) for of_one in waits] == [1, 1, 1, 1]
