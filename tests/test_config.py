"""Defaults, rules, the arithmetic of a recipe, the recipes that ship, and the way through JSON."""

import json
import math
from pathlib import Path

import pytest

from uta_jax import UserError
from uta_jax.commands import COMMANDS
from uta_jax.config import (
    check,
    default_config,
    make_recipe,
    make_task,
)
from uta_jax.config_files import load_config, read_config, save_config
from uta_jax.mesh import make_mesh
from uta_jax.models.presets import CLIP, VIT
from uta_jax.objectives import OBJECTIVES

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
IMAGENET_21K = 14_200_000


def config(**changes):
    """A valid configuration of the tiny student, with ``section__key=value`` changes."""
    c = default_config()
    c.student.preset, c.teacher.path, c.data.path = "uta_tiny", "teacher", "data"
    c.data.batch_size, c.train.steps = 16, 100
    for name, value in changes.items():
        assign(c, name.replace("__", "."), value)
    return c


def assign(c, key, value):
    *sections, name = key.split(".")
    for section in sections:
        c = c[section]
    c[name] = value


def leaves(tree, prefix=""):
    """Dotted key -> value."""
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DEFAULTS = dict(leaves(default_config()))


def recipe(c, examples=1000):
    return make_recipe(c, CLIP["tiny_clip"], examples)


# Defaults


def test_the_defaults_are_locked():
    c = default_config()
    with pytest.raises(AttributeError, match="Did you mean"):
        c.optim.lrr = 1.0
    with pytest.raises(KeyError):
        c.update({"optim": {"unknown": 1}})
    with pytest.raises(TypeError):
        c.train.steps = "many"


def test_the_defaults_want_only_what_they_cannot_know():
    """Steps, data and teacher are for the recipe to name; with those, the defaults are valid."""
    for key in ("train.steps", "data.path", "teacher.path"):
        c = config()
        assign(c, key, DEFAULTS[key])
        with pytest.raises(UserError, match=f"config.{key}"):
            check(c)
    check(config())


def test_made_up_data_and_mixtures_need_no_path():
    check(config(data__path="", data__source="synthetic"))
    check(config(data__path="", data__mixture=(("folder", "a", "", 1), ("tar", "b", "x", 0.5))))


# Rules


def numbers(kind):
    return [k for k, v in DEFAULTS.items() if isinstance(v, kind) and not isinstance(v, bool)]


def refuse(key, value):
    """Whatever looks at values, together: ``check``, and ``make_mesh`` for the mesh."""
    c = config()
    assign(c, key, value)
    with pytest.raises(UserError) as error:
        check(c)
        make_mesh(**c.mesh)
    assert f"{key}={value}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", numbers(float))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
def test_every_real_number_has_a_rule(key, value):
    refuse(key, value)


@pytest.mark.parametrize("key", numbers(int))
@pytest.mark.parametrize("value", [-2, 2**40])
def test_every_integer_has_a_rule(key, value):
    refuse(key, value)


FREE = {"teacher.path", "eval.classnames", "eval.templates_file"}  # the files' matter
FREE |= {k for k in DEFAULTS if k.endswith((".path", ".split"))}  # the sources'


@pytest.mark.parametrize("key", sorted({k for k, v in DEFAULTS.items() if type(v) is str} - FREE))
def test_every_choice_has_a_rule(key):
    refuse(key, "no_such_thing")


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.crop_scale", ()),
        ("data.crop_scale", (0.5,)),
        ("data.crop_scale", (0.0, 1.0)),
        ("data.crop_scale", (0.9, 0.2)),
        ("data.crop_scale", (0.2, 1.5)),
        ("data.crop_scale", (math.nan, 1.0)),
        ("data.crop_scale", ("a", "b")),
        ("data.mixture", (1,)),
        ("data.mixture", (("folder", "a", ""),)),
        ("data.mixture", (("folder", "a", "", 0.0),)),
        ("data.mixture", (("folder", "a", "", math.nan),)),
        ("data.mixture", (("folder", "a", "", "1"),)),
        ("data.mixture", (("no_such_kind", "a", "", 1.0),)),
        ("eval.names", ()),
        ("eval.names", ("knn", "knn")),
        ("eval.templates", ()),
        ("eval.templates", ("a photo",)),
        ("eval.templates", ("{}", "a {thing}")),
        ("eval.templates", ("{} {}",)),
        ("eval.templates", ("{",)),
        ("eval.templates", (1,)),
    ],
)
def test_every_tuple_has_a_rule(key, value):
    refuse(key, value)


def test_no_kind_of_value_is_left_out():
    """The tests above see numbers, texts and tuples; a switch can only be on or off."""
    tested = {*numbers(float), *numbers(int), "data.crop_scale", "data.mixture", "eval.templates"}
    tested |= {"eval.names"}
    tested |= {"data.flip", "data.allow_truncated", "train.save_async", "runlocal"}
    tested |= {key for key, value in DEFAULTS.items() if isinstance(value, str)}
    assert tested == set(DEFAULTS)


@pytest.mark.parametrize("key", ["optim.lr", "optim.eps", "data.batch_size", "train.log_every"])
def test_zero_is_refused_where_it_means_nothing(key):
    refuse(key, type(DEFAULTS[key])(0))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.98])
def test_good_mask_ratios_pass(ratio):
    assert recipe(config(mask__ratio=ratio)).task.mask.keep == round(64 * (1 - ratio))


# What fits together


def test_epochs_become_steps():
    c = config(train__steps=0, train__epochs=3.0, optim__warmup_epochs=0.5)
    optim = recipe(c, examples=1000).optim
    assert (optim.total_steps, optim.warmup_steps) == (188, 31)  # 187.5 and 31.25 batches of 16


def test_steps_win_over_epochs():
    c = config(train__epochs=3.0, optim__warmup_steps=7, optim__warmup_epochs=0.5)
    optim = recipe(c).optim
    assert (optim.total_steps, optim.warmup_steps) == (100, 7)


def test_the_recipe_carries_every_optimizer_value():
    values = {"lr": 0.5, "start_lr": 0.1, "end_lr": 0.2, "b1": 0.3, "b2": 0.4, "eps": 0.6}
    values |= {"weight_decay": 0.7, "clip_norm": 0.8}
    r = recipe(
        config(seed=9, optim__ema_decay=0.99, **{f"optim__{k}": v for k, v in values.items()})
    )
    assert {name: getattr(r.optim, name) for name in values} == values
    assert (r.ema_decay, r.seed) == (0.99, 9)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data__batch_size": 12}, "data.batch_size=12 .* 8 devices: choose a multiple of 8"),
        ({"data__batch_size": 1008}, "data.batch_size=1008 .* 1000 training examples"),
        ({"optim__warmup_steps": 100}, "optim.warmup_steps=100 .* the run has 100: lower it"),
        ({"optim__warmup_epochs": 2.0}, "optim.warmup_epochs=2.0 makes 125 steps"),
        (
            {"mesh__tensor": 8},
            "mesh.tensor=8 .* 4 heads and 340 hidden .* student: .* divisor of 4",
        ),
        (
            {"train__accumulate": 4},
            "accumulate=4 .* 2 images that config.data.batch_size=16 .* multiple of 32",
        ),
        (
            {"train__accumulate": 2, "objective": "contrastive", "student__preset": "tiny_clip"},
            "accumulate=2 changes objective 'contrastive', .*: use 1",
        ),
        ({"train__steps": 0, "train__epochs": 0.001}, "train.epochs=0.001 .* raise it"),
        ({"mask__ratio": 0.999}, "mask.ratio=0.999 keeps 0 of 64 patches: lower it"),
        ({"student__image_size": 60}, "student.image_size=60 .* choose 56 or 64"),
        ({"student__image_size": 4}, "student.image_size=4 .* choose 8$"),
        (
            {"teacher__image_size": 72},
            "image_size=72 .* config.teacher.image_size=64 or .*student.*=72",
        ),
        (
            {"teacher__image_size": 70},
            "image_size=70 .* 8.75, .* use config.teacher.image_size=64$",
        ),
        ({"objective": "contrastive"}, "student.preset=uta_tiny has no text tower.*tiny_clip"),
        ({"mask__kind": "block", "mask__ratio": 0.2}, "min_block=16 .* 13 patches"),
        ({"mask__kind": "reversed_block", "mask__ratio": 0.8}, "min_block=16 .* 13 patches"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, words):
    with pytest.raises(UserError, match=f"^config.*{words}") as error:
        recipe(config(**changes))
    assert "\n" not in str(error.value)


def test_the_sizes_an_error_proposes_do_match():
    """Both remedies of the message about grids, taken at its word."""
    grids = []
    for changes in ({"teacher__image_size": 64}, {"student__image_size": 72}):
        task = recipe(config(**{"teacher__image_size": 72} | changes)).task
        grids.append((task.student.grid, task.teacher.vision.grid))
    assert grids == [(8, 8), (9, 9)]


def test_the_teacher_runs_at_the_size_of_the_student_grid():
    """A /14 teacher of 224 px for a /16 student of 224 px runs at 196 px."""
    c = config(student__preset="uta_b16")
    task = make_task(c, CLIP["eva01_g14_plus"])
    assert task.teacher.vision.image_size == 196
    assert task.teacher.vision.grid == task.student.grid == 14


def test_the_student_projects_into_the_space_of_the_teacher():
    task = make_task(config(), CLIP["clip_b16"])
    assert VIT["uta_tiny"].out_dim == 64 and task.student.out_dim == 512


# The recipes that ship


def fake_teacher(c):
    """What the teacher of a recipe is, without its weights."""
    if not OBJECTIVES[c.objective].needs_teacher:
        return None
    return CLIP["eva01_g14_plus" if "eva01" in c.teacher.path else "tiny_clip"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_fit_together(path):
    c = read_config(str(path), [])
    assert c.is_locked
    r = make_recipe(c, fake_teacher(c), IMAGENET_21K)
    assert 0 < r.optim.warmup_steps < r.optim.total_steps
    if r.task.teacher:
        assert r.task.teacher.vision.grid == r.task.student.grid
    command = f"uta-jax train --config=configs/{path.name} --workdir=runs/"
    assert command in path.read_text(), "a recipe says how it is run"


@pytest.mark.parametrize(
    "name, steps, warmup", [("uta_b16", 1_040_039, 6934), ("uta_g14", 520_020, 6934)]
)
def test_schedules_of_the_full_recipes(name, steps, warmup):
    """150 epochs of ImageNet-21k in batches of 2048 and 4096; warm-up of 1 and 2 epochs."""
    c = read_config(str(CONFIGS[0].with_stem(name)), [])
    optim = make_recipe(c, fake_teacher(c), IMAGENET_21K).optim
    assert (optim.total_steps, optim.warmup_steps) == (steps, warmup)


def test_the_example_of_the_command_line_is_a_recipe_that_ships():
    assert "--config=configs/demo.py" in COMMANDS["train"].example
    assert "demo" in {path.stem for path in CONFIGS}


# JSON


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_save_and_load_give_the_same(path, tmp_path):
    mixture = (("folder", "a", "", 1.0), ("tar", "b", "train", 0.5))
    changes = ["--config.data.crop_scale=(0.5, 0.75)", f"--config.data.mixture={mixture}"]
    c = read_config(str(path), changes)
    save_config(c, tmp_path / "config.json")
    again = load_config(tmp_path / "config.json")
    assert dict(leaves(again)) == dict(leaves(c))
    assert {k: type(v) for k, v in leaves(again)} == {k: type(v) for k, v in leaves(c)}
    assert again.data.crop_scale == (0.5, 0.75) and again.data.mixture == mixture
    assert isinstance(again.eval.templates, tuple)
    assert again.is_locked
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"optim": {"unknown": 1}}', "unknown"),
        ('{"train": {"steps": "many"}}', "steps"),
        ('{"optim": {"lr": 0.1', "config.json"),
        ("[]", "config.json"),
    ],
)
def test_loading_is_strict(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_loading_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="config.json is missing: not the workdir"):
        load_config(tmp_path / "config.json")


def test_a_config_from_before_a_key_existed_gets_its_default(tmp_path):
    values = json.loads(json.dumps(config(optim__lr=0.5).to_dict()))
    del values["optim"]["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    again = load_config(tmp_path / "config.json")
    assert (again.optim.lr, again.optim.ema_decay) == (0.5, 0.0)


def test_a_project_needs_its_package(monkeypatch):
    c = default_config()
    c.train.steps, c.data.path, c.teacher.path, c.train.wandb = 1, "data", "asset:tiny_clip", "mine"
    monkeypatch.setattr("uta_jax.config.find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.train.wandb=mine .*: pip install wandb"):
        check(c)
    monkeypatch.setattr("uta_jax.config.find_spec", lambda name: name)
    check(c)
