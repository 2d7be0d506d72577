"""The command line: a mistake costs one clear line and exit code 2, no compilation, no file."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import uta_jax.config
import uta_jax.train
from uta_jax import UserError
from uta_jax.__main__ import _parser, main
from uta_jax.checkpoint import Checkpoints
from uta_jax.commands import COMMANDS
from uta_jax.config import default_config, make_recipe
from uta_jax.config_files import save_config
from uta_jax.models.presets import CLIP
from uta_jax.step import state_shapes

ROOT = Path(__file__).parents[1]


class Compiled(Exception):
    """The run got past every check."""


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    """What comes after the checks: reaching it is a failure that no handler takes for a mistake."""

    def reached(*args, **kwargs):
        raise Compiled

    monkeypatch.setattr(uta_jax.train, "init_state", reached)
    monkeypatch.setattr(uta_jax.train, "compile_step", reached)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, scenes, teacher_dir):
    """A recipe that is right in everything, for a run of 50 steps."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    values = {
        "student.preset": "uta_tiny",
        "student.dtype": "float32",
        "teacher.path": str(teacher_dir),
        "data.path": str(scenes),
        "eval.path": str(scenes),
        "data.batch_size": 16,
        "train.steps": 50,
    }
    lines = [f"    c.{key} = {value!r}" for key, value in values.items()]
    path.write_text("\n".join([
        "from uta_jax.config import default_config\n\n\ndef get_config():",
        "    c = default_config()", *lines, "    return c", "",
    ]))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, teacher_dir):
    """The workdir of an interrupted run: step 5 of another architecture, tiny_clip, and a log."""
    c = default_config()
    c.student.preset, c.teacher.path = "tiny_clip", str(teacher_dir)
    c.data.path, c.data.batch_size, c.train.steps = "data", 16, 50
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    workdir.mkdir()
    shapes = state_shapes(make_recipe(c, CLIP["tiny_clip"], 256))
    state = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes)
    checkpoints = Checkpoints(workdir)
    checkpoints.open(state)
    checkpoints.save(state.replace(step=np.int32(5)), {}, {"teacher": {}})
    checkpoints.close()
    save_config(c, workdir / "config.json")
    (workdir / "metrics.jsonl").write_text('{"step": 5, "loss": -0.5}\n')
    return workdir


def contents(folder):
    """Of every file but those that tell who came last, and how long all have lived."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "seconds"))
    return {p.relative_to(folder): p.read_bytes() for p in files}


def run(*argv):
    """Exit code of ``uta-jax ARGV``."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:  # argparse's own mistakes, and --help
        return stop.code


def refuse(capsys, argv, *words):
    """The command ends with code 2 and one line, which holds all ``words``; returns the line."""
    code = run(*argv)
    line = capsys.readouterr().err
    assert code == 2, line
    assert line.endswith("\n") and line.count("\n") == 1, f"not one line:\n{line}"
    assert line.startswith("uta-jax")
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    return line


def test_without_a_mistake_the_run_would_compile(recipe_file, tmp_path):
    """Else every test below could pass for a reason of its own making."""
    with pytest.raises(Compiled):
        main(["train", f"--config={recipe_file}", f"--workdir={tmp_path / 'run'}"])


# Arguments of a mistake -> what its line must say: the key, the value, what would be right.
MISTAKES = {
    "typo": (["--config.optim.lrr=1"], ["--config.optim.lrr=1", 'Did you mean "lr"']),
    "typo in a section": (["--config.optin.lr=1"], ["--config.optin.lr=1", '"optim"']),
    "no number": (["--config.optim.lr=fast"], ["--config.optim.lr=fast", "float"]),
    "lr nan": (["--config.optim.lr=nan"], ["optim.lr=nan", "a finite number > 0"]),
    "lr negative": (["--config.optim.lr=-1"], ["optim.lr=-1.0", "a finite number > 0"]),
    "no steps": (["--config.train.steps=0"], ["train.steps=0", "train.epochs, > 0"]),
    "half a step": (["--config.train.steps=2.5"], ["train.steps=2.5", "int()"]),
    "ratio -0.1": (["--config.mask.ratio=-0.1"], ["mask.ratio=-0.1", "in [0, 1)"]),
    "ratio 1": (["--config.mask.ratio=1.0"], ["mask.ratio=1.0", "in [0, 1)"]),
    "ratio 0.999": (["--config.mask.ratio=0.999"], ["mask.ratio=0.999 keeps 0", "lower it"]),
    "patches": (["--config.student.image_size=60"], ["student.image_size=60", "56 or 64"]),
    "grids": (
        ["--config.teacher.image_size=72"],
        ["teacher.image_size=72", "teacher.image_size=64", "student.image_size=72"],
    ),
    "batch over devices": (["--config.data.batch_size=12"], ["batch_size=12", "multiple of 8"]),
    "batch over examples": (
        ["--config.data.batch_size=264"],
        ["data.batch_size=264", "256 training examples", "lower it"],
    ),
    "choice": (["--config.student.preset=uta_b17"], ["student.preset=uta_b17", "uta_b16"]),
    "crop": (["--config.data.crop_scale=(0.9,0.2)"], ["data.crop_scale=(0.9, 0.2)", "low <="]),
    "mesh": (["--config.mesh.data=3"], ["mesh.data=3", "8 devices"]),
    "split": (["--config.data.split=test"], ["data.split='test'", "val_single"]),
    "no teacher": (["--config.teacher.path="], ["teacher.path is empty", "asset:"]),
    "no such teacher": (
        ["--config.teacher.path=no/such/clip"],
        ["config.teacher.path", "no/such/clip: no such file or directory"],
    ),
    "no such asset": (["--config.teacher.path=asset:x"], ["config.teacher.path", "asset:x"]),
    "no such data": (["--config.data.path=no/such/data"], ["data.path=no/such/data"]),
    "no such eval data": (
        ["--config.eval.path=no/such/data"],
        ["config.eval", "no/such/data: no TFDS dataset there"],
    ),
    "no captions' tower": (
        ["--config.objective=contrastive"],
        ["student.preset=uta_tiny has no text tower", "tiny_clip"],
    ),
    "1e5": (["--config.train.steps=1e5"], ["train.steps=1e5", "int()"]),
    "platform": (["--config.platform=tpu"], ["config.platform=tpu: not what JAX finds"]),
    "two recipes": (["--config=x.py"], ["--config is given twice, the second time as 'x.py'"]),
    "unknown flag": (["--lr=1"], ["--lr=1", "--config.KEY=VALUE"]),
    "stray word": (["fast"], ["'fast'", "--config.KEY=VALUE"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_the_configuration(name, recipe_file, saved_run, capsys, monkeypatch):
    """Seen before the teacher's weights are read, too."""
    if "eval" not in name:
        monkeypatch.setattr(uta_jax.train, "load_clip", uta_jax.train.init_state)
    arguments, words = MISTAKES[name]
    before = contents(saved_run)
    refuse(
        capsys, ["train", f"--config={recipe_file}", f"--workdir={saved_run}", *arguments], *words
    )
    assert contents(saved_run) == before


def damaged(teacher, where, damage):
    """A copy of the teacher with ``damage(folder)`` done to it."""
    shutil.copytree(teacher, where)
    damage(where)
    return where


def truncate(folder):
    os.truncate(folder / "model.safetensors", 1_000_000)


def remove(folder):
    (folder / "model.safetensors").unlink()


def widen(folder):
    text = (folder / "config.json").read_text()
    assert '"hidden_size": 128' in text
    (folder / "config.json").write_text(text.replace('"hidden_size": 128', '"hidden_size": 192'))


def rename(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"model_type": "clip"', '"model_type": "bert"')
    )


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, ["model.safetensors: truncated"]),
        (remove, ["model.safetensors: no such file"]),
        (widen, ["keys do not match", "misshaped", "(128,) for (192,)"]),
        (rename, ["config.json", "bert", "clip"]),
    ],
)
def test_mistakes_of_the_teacher(
    damage, words, recipe_file, teacher_dir, saved_run, tmp_path, capsys
):
    before = contents(saved_run)
    path = damaged(teacher_dir, tmp_path / "clip", damage)
    argv = ["train", f"--config={recipe_file}", f"--workdir={saved_run}"]
    refuse(
        capsys, [*argv, f"--config.teacher.path={path}"], "config.teacher.path", str(path), *words
    )
    assert contents(saved_run) == before


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="permissions do not bind root")
@pytest.mark.parametrize(
    "workdir, words",
    [("/sys/run", "name a directory"), ("/sys/kernel", "cannot be written to: ")],
    ids=["new", "there"],
)
def test_82_a_workdir_where_nothing_can_be_written(recipe_file, capsys, workdir, words):
    argv = ["train", f"--config={recipe_file}", f"--workdir={workdir}"]
    refuse(capsys, argv, f"--workdir={workdir}", words)


@pytest.mark.parametrize("section", ["data", "eval"])
def test_an_empty_folder_of_images(section, recipe_file, saved_run, tmp_path, capsys):
    before = contents(saved_run)
    source = [f"--config.{section}.{k}" for k in ("source=folder", f"path={tmp_path}", "split=")]
    argv = ["train", f"--config={recipe_file}", f"--workdir={saved_run}", *source]
    refuse(capsys, argv, section, str(tmp_path), "no images found (looked for .jpg")
    assert contents(saved_run) == before


def test_data_without_captions(recipe_file, saved_run, tmp_path, capsys, scenes):
    """Images alone cannot train a text tower: seen before the state is made."""
    from uta_jax.data.sources import open_source

    source = open_source("tfds", scenes, "train")
    for n in range(16):
        (tmp_path / f"{n}.png").write_bytes(source[n]["image"])
    before = contents(saved_run)
    changes = ["objective=contrastive", "student.preset=tiny_clip", "data.source=folder"]
    changes += [f"data.path={tmp_path}", "data.split="]
    argv = ["train", f"--config={recipe_file}", f"--workdir={tmp_path / 'new'}"]
    refuse(capsys, [*argv, *(f"--config.{c}" for c in changes)], "captions", "'text'")
    assert contents(saved_run) == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ([], ["does not fit", "another workdir"]),  # the recipe's uta_tiny onto a saved tiny_clip
        (["student.preset=tiny_clip", "student.image_size=128"], ["does not fit"]),
        (["student.preset=tiny_clip", "optim.ema_decay=0.9"], ["ema"]),
    ],
)
def test_a_workdir_of_another_architecture(changes, words, recipe_file, saved_run, capsys):
    before = contents(saved_run)
    argv = ["train", f"--config={recipe_file}", f"--workdir={saved_run}"]
    refuse(capsys, [*argv, *(f"--config.{c}" for c in changes)], str(saved_run), *words)
    assert contents(saved_run) == before


def test_a_truncated_checkpoint_in_the_workdir(recipe_file, saved_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(saved_run, workdir)
    os.truncate(workdir / "checkpoints" / "5" / "params" / "_METADATA", 100)
    before = contents(workdir)
    argv = ["train", f"--config={recipe_file}", f"--workdir={workdir}"]
    assert run(*argv, "--config.student.preset=tiny_clip") == 2
    loud, line = capsys.readouterr().err.splitlines()
    assert loud.startswith("CHECKPOINT 5 IS DAMAGED: params/_METADATA has 100 bytes")
    assert line.startswith("uta-jax train: ") and "no checkpoint is whole (5-damaged" in line
    # Put aside, not deleted.
    aside, now = Path("checkpoints", "quarantine", "5-damaged"), contents(workdir)
    for path, data in before.items():
        moved = aside / path.relative_to("checkpoints/5") if "5" in path.parts else path
        assert now[moved] == data


def test_a_workdir_without_a_name(recipe_file, capsys):
    argv = ["train", f"--config={recipe_file}", "--workdir="]
    refuse(capsys, argv, "--workdir= is empty: name a directory")


@pytest.mark.parametrize("below", ["", "run"])
def test_a_workdir_that_is_a_file(below, recipe_file, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    workdir = file / below if below else file
    argv = ["train", f"--config={recipe_file}", f"--workdir={workdir}"]
    refuse(capsys, argv, f"--workdir={workdir}", "name a directory")
    assert file.read_text() == "precious"


def test_a_missing_recipe(saved_run, capsys):
    argv = ["train", "--config=configs/none.py", f"--workdir={saved_run}"]
    refuse(capsys, argv, "--config=configs/none.py: no such file", "configs/demo.py")


@pytest.mark.parametrize(
    "body, words",
    [
        ("    c.optim.lrr = 1\n", ["lrr", "lr"]),
        ("    c.train.steps = 'many'\n", ["many", "steps"]),
    ],
)
def test_a_mistake_inside_the_recipe(body, words, tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from uta_jax.config import default_config\n\ndef get_config():\n"
        f"    c = default_config()\n{body}    return c\n"
    )
    argv = ["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    refuse(capsys, argv, f"--config={recipe}", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["COMMAND", "--help"]),
        (["trane"], ["trane", "train", "--help"]),
        (["train", "--workdir=x"], ["--config", "--help"]),
        (["evaluate"], ["--workdir", "--help"]),
        (["evaluate", "--workdir=x", "--fast"], ["--fast", "--help"]),
        (["evaluate", "--workdir=no/such/run"], ["no/such/run/config.json is missing"]),
        (["report", "no/such/run"], ["no/such/run/config.json is missing"]),
        (["report"], ["WORKDIR", "--help"]),
        (["export", "--workdir=no/such/run", "--out=x"], ["no/such/run/config.json is missing"]),
        (["export", "--workdir=x", "--out=x", "--format=onnx"], ["--format", "onnx", "hf", "uta"]),
        (["convert", "no/such/clip", "x"], ["no/such/clip: no such file or directory"]),
        (["data", "cifar", "--out=x"], ["cifar", "emoji_scenes"]),
        (["data", "emoji_scenes", "--out=x", "--train=0"], ["train"]),
    ],
)
def test_mistakes_of_the_other_commands(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(capsys, argv, *words)
    assert not list(tmp_path.iterdir())


def test_convert_replaces_nothing_unasked(teacher_dir, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("precious")
    refuse(capsys, ["convert", teacher_dir, out], str(out), "already exists", "overwrite")
    assert contents(out) == {Path("file"): b"precious"}


def test_a_message_of_many_lines_becomes_one(capsys, monkeypatch, tmp_path):
    def fail(*args):
        raise UserError("first\n  second")

    monkeypatch.setattr(uta_jax.config, "check", fail)
    argv = ["train", f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={tmp_path}"]
    refuse(capsys, argv, "train: first second")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_with_an_example_that_parses(name, capsys):
    assert run(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    command = COMMANDS[name]
    assert command.summary in text and command.example in text
    program, *arguments = shlex.split(command.example)
    args, rest = _parser().parse_known_args(arguments)
    assert (program, args.command) == ("uta-jax", name)
    assert all(a.startswith("--config.") for a in rest) and (name in ("train", "plan") or not rest)


def test_help_of_all_names_every_command(capsys):
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {command.summary}" in text for name, command in COMMANDS.items())


# As users run it: another process, from a directory that is not the repository's.


def uta_jax_process(*argv, cwd):
    """stdout + exit code + stderr of the command where only the package itself can be imported."""
    package = cwd / "site"
    package.mkdir()
    (package / "uta_jax").symlink_to(ROOT / "uta_jax")
    environment = os.environ | {"PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, "-m", "uta_jax", *map(str, argv)],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_a_mistake_in_a_process(recipe_file, saved_run, tmp_path):
    before = contents(saved_run)
    argv = ["train", f"--config={recipe_file}", f"--workdir={saved_run}"]
    done = uta_jax_process(*argv, "--config.mask.ratio=0.999", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "uta-jax train: config.mask.ratio=0.999 keeps 0 of 64 patches: lower it\n"
    )
    assert contents(saved_run) == before


def test_a_recipe_that_imports_its_neighbour_in_a_process(tmp_path):
    """uta_l14 is built on uta_b16, whatever the directory it is run from."""
    recipe = ROOT / "configs" / "uta_l14.py"
    argv = ["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    done = uta_jax_process(*argv, "--config.optim.lr=-1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "uta-jax train: config.optim.lr=-1.0 is not allowed: it must be a finite number > 0\n",
    )
