"""``--config.runlocal=True``: the whole path of every recipe that ships, with nothing at hand."""

import json
from pathlib import Path

import pytest

from uta_jax.__main__ import main
from uta_jax.config import check, default_config, leaves, make_recipe
from uta_jax.config_files import load_config, read_config
from uta_jax.evals import is_scored
from uta_jax.masking import keep_count
from uta_jax.models.presets import CLIP, VIT
from uta_jax.objectives import OBJECTIVES
from uta_jax.runlocal import BATCH, STEPS, shrink

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SWITCH = "--config.runlocal=True"


def names(paths):
    return [path.stem for path in paths]


# Shrunk, all recipes of one objective and one family are the same: one of each is trained.
TRAINED = [
    pytest.param(path, marks=() if path.stem == "uta_g14" else pytest.mark.slow, id=path.stem)
    for path in RECIPES
    if path.stem not in ("demo", "uta_b16", "uta_l14")
]


@pytest.mark.parametrize("path", TRAINED)
def test_every_kind_of_recipe_trains_with_nothing_at_hand(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data, no teacher, no mesh of the size that is asked for
    argv = ["train", f"--config={path}", "--workdir=run", "--config.mesh.fsdp=512", SWITCH]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    recipe = leaves(read_config(str(path), ["--config.mesh.fsdp=512"]))
    used = leaves(load_config(tmp_path / "run" / "config.json"))
    for key in recipe.keys() - {"runlocal"}:
        line = f"runlocal: {key}: {recipe[key]!r} -> {used[key]!r}\n"
        assert (line in printed) == (recipe[key] != used[key]), key
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, STEPS + 1))
    scored = [row["step"] for row in logged if is_scored(row)]
    assert scored == ([STEPS // 2, STEPS] if recipe["eval.path"] else [])


def test_recipes_that_are_not_trained_are_those_of_another_when_shrunk():
    shrunk = {path.stem: leaves(read_config(str(path), [SWITCH])) for path in RECIPES}
    for name in ("uta_b16", "uta_l14"):
        differ = {k for k, value in shrunk[name].items() if value != shrunk["uta_g14"][k]}
        kept = {keep_count(64, shrunk[which]["mask.ratio"]) for which in (name, "uta_g14")}
        assert len(kept) == 1  # of the little grid's patches
        assert all(key.startswith(("optim.", "mask.ratio")) for key in differ), differ


@pytest.mark.parametrize("preset", sorted(VIT))
def test_the_little_student_has_the_traits_of_its_family(preset):
    """Positions, activation, norms and biases are those of a UTA model or of CLIP."""
    c = default_config()
    c.student.preset = preset
    shrink(c)
    little, spec = VIT[c.student.preset], VIT[preset]
    assert (little.rope_theta > 0, little.mlp_norm) == (spec.rope_theta > 0, spec.mlp_norm)
    assert little.width * little.depth <= 512


def test_what_is_small_already_stays():
    c = default_config()
    c.data.batch_size, c.train.steps, c.train.save_every, c.mask.min_block = 4, 2, 1, 2
    shrink(c)
    assert (c.data.batch_size, c.train.steps, c.train.save_every, c.mask.min_block) == (4, 2, 1, 2)


def test_what_is_learnt_and_how_stays():
    """Objective, mask, optimizer, dtypes, remat: without them the run would show little."""
    path = str(RECIPES[names(RECIPES).index("uta_g14")])
    overrides = ["--config.optim.lr=1e-4", "--config.mask.kind=block"]
    changes = [
        "--config.student.remat=full", "--config.optim.ema_decay=0.9", "--config.mask.ratio=0.9",
    ]  # fmt: skip
    c = read_config(path, [*overrides, *changes, SWITCH])
    assert (c.optim.lr, c.mask.kind, c.student.remat) == (1e-4, "block", "full")
    assert (c.optim.ema_decay, c.mask.ratio, c.student.dtype) == (0.9, 0.9, "bfloat16")


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 10**6])
@pytest.mark.parametrize("warmup", ["optim.warmup_steps=1000", "optim.warmup_epochs=1.0"])
def test_any_schedule_fits_after_it_is_shrunk(steps, warmup):
    path = str(RECIPES[names(RECIPES).index("uta_b16")])
    c = read_config(path, [f"--config.train.steps={steps}", f"--config.{warmup}", SWITCH])
    check(c)
    assert OBJECTIVES[c.objective].needs_teacher
    optim = make_recipe(c, CLIP["tiny_clip"], STEPS * BATCH, devices=1).optim
    assert optim.total_steps == min(steps, STEPS)
    assert optim.warmup_steps < optim.total_steps


def test_an_unknown_preset_is_refused_as_ever(tmp_path, capsys):
    argv = ["train", f"--config={RECIPES[0]}", f"--workdir={tmp_path}", SWITCH]
    assert main([*argv, "--config.student.preset=uta_b17"]) == 2
    assert "student.preset=uta_b17" in capsys.readouterr().err
