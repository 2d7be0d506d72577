"""``uta-jax convert``: tensor by tensor into our own directory, whole or not at all."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from interop_models import (
    CLIP_SPEC,
    SPECS,
    UTA_SPEC,
    assert_equal_trees,
    edit_json,
    files_below,
    random_params,
    write_model,
)
from safetensors.numpy import load_file, save_file

from uta_jax import UserError
from uta_jax.__main__ import main
from uta_jax.interop import translate
from uta_jax.interop.export import export
from uta_jax.interop.files import WRITTEN, sha256, write_json, write_safetensors
from uta_jax.interop.hf_config import hf_configs
from uta_jax.interop.teacher import convert, load_clip, read_spec
from uta_jax.models.presets import CLIP
from uta_jax.objectives import Task


@pytest.fixture(params=SPECS)
def written(request, tmp_path):
    return request.param, write_model(tmp_path / "model", request.param)


@pytest.fixture
def hf_dir(tmp_path):
    return write_model(tmp_path / "hf", "hf_clip")


def test_everything_is_kept(written, tmp_path):
    fmt, folder = written
    told = convert(folder, tmp_path / "ours")
    first, second = load_clip(folder), load_clip(tmp_path / "ours")
    assert told.spec == second.spec == first.spec
    assert told.provenance == second.provenance == first.provenance
    assert told.provenance["format"] == fmt
    assert_equal_trees(first.params, second.params)
    names = {"spec.json", "weights.safetensors"}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == names <= WRITTEN
    record = json.loads((tmp_path / "ours" / "spec.json").read_text())
    assert record["sha256"] == sha256(tmp_path / "ours" / "weights.safetensors")


def test_a_conversion_of_a_conversion_is_the_same_file(hf_dir, tmp_path):
    convert(hf_dir, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_our_file_is_an_ordinary_one(hf_dir, tmp_path):
    """Any reader of safetensors sees our parameters under their paths."""
    convert(hf_dir, tmp_path / "ours")
    flat = translate.flatten(random_params(CLIP_SPEC))
    tensors = load_file(tmp_path / "ours" / "weights.safetensors")
    assert tensors.keys() == flat.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, flat[name], err_msg=name)


def test_released_layout_there_and_back(tmp_path):
    """Every tensor, the rotary tables among them, bit for bit."""
    source = write_model(tmp_path / "uta", "uta")
    params = random_params(UTA_SPEC)
    before = translate.to_theirs("uta", UTA_SPEC, params)
    convert(source, tmp_path / "ours")
    clip = load_clip(tmp_path / "ours")
    export(clip.params, clip.spec, "uta", tmp_path / "out", {})
    after = load_file(tmp_path / "out" / "uta.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.tobytes() == after[name].tobytes(), name


def test_another_image_size(hf_dir, tmp_path):
    convert(hf_dir, tmp_path / "ours", image_size=32)
    ours, theirs = load_clip(tmp_path / "ours"), load_clip(hf_dir, image_size=32)
    assert ours.spec == theirs.spec and ours.spec.vision.image_size == 32
    assert_equal_trees(ours.params, theirs.params)


def test_the_crop_stays_the_same_share_of_the_image(hf_dir, tmp_path):
    convert(hf_dir, tmp_path / "a")
    edit_json(tmp_path / "a" / "spec.json", spec=asdict(replace(CLIP_SPEC, resize_size=30)))
    for size, resized in ((48, 60), (8, 10)):
        convert(tmp_path / "a", tmp_path / f"{size}", image_size=size)
        spec = read_spec(tmp_path / f"{size}")
        assert (spec.vision.image_size, spec.resize_size) == (size, resized)
        task = Task("uta", spec.vision, spec.mean, spec.std, teacher=read_spec(tmp_path / "a"))
        assert task.clip == spec


def test_the_tokenizer_comes_along(tmp_path):
    spec = replace(CLIP_SPEC, tokenizer="tokenizer.json")
    root = write_model(tmp_path / "hf", "hf_clip")
    convert(root, tmp_path / "a")
    edit_json(tmp_path / "a" / "spec.json", spec=asdict(spec))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b")
    assert load_clip(tmp_path / "b").tokenizer_file == tmp_path / "b" / "tokenizer.json"
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    for name in ("../secret", "weights.safetensors", ".."):  # of ours, it would be written over
        edit_json(tmp_path / "a" / "spec.json", spec=asdict(replace(spec, tokenizer=name)))
        with pytest.raises(UserError, match=f"tokenizer='{name}' must be one of: clip, "):
            convert(tmp_path / "a", tmp_path / "c")


def test_memory_is_a_few_tensors(tmp_path, monkeypatch):
    """Of all that passes through, hardly anything is there at once."""
    vision = replace(CLIP_SPEC.vision, width=128, depth=12, mlp_hidden=512)
    spec = replace(CLIP_SPEC, vision=vision)
    monkeypatch.setitem(SPECS, "hf_clip", spec)
    source = write_model(tmp_path / "hf", "hf_clip")
    translate.their_shapes("hf_clip", spec)  # tracing the model allocates, too
    tracemalloc.start()
    convert(source, tmp_path / "ours")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (source / "model.safetensors").stat().st_size
    assert size > 9e6 and peak < size / 2


# What may be replaced


def test_an_earlier_conversion_is_replaced_only_when_asked(written, tmp_path):
    fmt, folder = written
    convert(folder, tmp_path / "ours")
    before = files_below(tmp_path / "ours")
    with pytest.raises(UserError, match="already exists"):
        convert(folder, tmp_path / "ours")
    assert files_below(tmp_path / "ours") == before
    convert(tmp_path / "ours", folder, overwrite=True)
    assert {p.name for p in folder.iterdir()} == {"spec.json", "weights.safetensors"}
    assert_equal_trees(load_clip(folder).params, random_params(SPECS[fmt]))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("checkpoints/100/state", "checkpoints"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("model.safetensors/part", "model.safetensors"),
    ],
)
def test_overwriting_never_deletes_what_no_conversion_wrote(hf_dir, tmp_path, file, named):
    """A run, which also has a config.json, say."""
    run = tmp_path / "run"
    (run / file).parent.mkdir(parents=True)
    (run / file).write_text("weeks of work")
    (run / "config.json").write_text("{}")
    before = files_below(run)
    with pytest.raises(UserError, match=f"run: not overwritten, .* '{named}'"):
        convert(hf_dir, run, overwrite=True)
    assert files_below(run) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


# The command


def test_no_torch_and_no_tensorflow(hf_dir, tmp_path):
    code = """if True:
        import sys
        import uta_jax
        heavy = {"torch", "tensorflow", "transformers", "open_clip", "timm"}
        assert not (heavy | {"jax", "numpy"}) & set(sys.modules), "import uta_jax"
        from uta_jax.__main__ import main
        assert main(["convert", *sys.argv[1:]]) == 0
        assert main(["convert", "--check", sys.argv[1]]) == 0
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, hf_dir, tmp_path / "ours"]
    subprocess.run(list(map(str, command)), check=True, cwd=root)
    assert load_clip(tmp_path / "ours").spec == CLIP_SPEC


def test_check_prints_where_every_tensor_goes(hf_dir, capsys):
    tensors = load_file(hf_dir / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = np.arange(10)
    write_with(hf_dir, tensors)
    before = files_below(hf_dir)
    assert main(["convert", "--check", str(hf_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{hf_dir}: Hugging Face CLIPModel (hf_clip)"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert tensors.keys() <= rows.keys()
    fc1 = rows["vision_model.encoder.layers.2.mlp.fc1.weight"]
    assert fc1 == "(56, 32) float32 vision/blocks/mlp/up/kernel[2] linear"
    assert rows["vision_model.embeddings.position_ids"] == "(10,) int64 dropped"
    assert "vision.act = 'quick_gelu'" in lines and "mean = (0.4, 0.5, 0.6)" in lines
    assert files_below(hf_dir) == before


def test_check_obeys_every_option(hf_dir, capsys):
    assert main(["convert", "--check", str(hf_dir), "--image_size=16"]) == 0
    assert "vision.image_size = 16" in capsys.readouterr().out.splitlines()
    assert main(["convert", "--check", str(hf_dir), "--sha256=00"]) == 2
    assert "not the 00 wanted" in capsys.readouterr().err


def test_check_of_a_fused_matrix(tmp_path, capsys):
    assert main(["convert", "--check", str(write_model(tmp_path / "uta", "uta"))]) == 0
    assert "text/blocks/attn/{q,k,v}/kernel[1]" in capsys.readouterr().out


def test_check_marks_what_is_wrong(hf_dir, capsys):
    tensors = load_file(hf_dir / "model.safetensors")
    tensors["other"] = tensors.pop("logit_scale")
    write_with(hf_dir, tensors)
    assert main(["convert", "--check", str(hf_dir)]) == 2
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert ["logit_scale", "MISSING", "logit_scale", "same"] in rows
    assert ["other", "()", "float32", "UNEXPECTED"] in rows
    assert "missing: logit_scale (); unexpected: other ()" in told.err


def test_the_command_wants_a_directory_to_write(hf_dir, capsys):
    assert main(["convert", str(hf_dir)]) == 2
    assert "name the directory to write" in capsys.readouterr().err


def test_all_options(hf_dir, tmp_path, capsys):
    digest = sha256(hf_dir / "model.safetensors")
    options = ["--format=hf_clip", f"--sha256={digest.upper()}", "--image_size=16"]
    assert main(["convert", str(hf_dir), str(tmp_path / "ours"), *options]) == 0
    assert "(hf_clip) -> " in capsys.readouterr().out
    clip = load_clip(tmp_path / "ours")
    assert clip.spec.vision.image_size == 16 and clip.provenance["sha256"] == digest


def test_preset_of_weights_alone(tmp_path):
    """Without a configuration, shapes and a choice are enough."""
    spec = CLIP["tiny_clip"]
    params = random_params(spec)
    tensors = translate.to_theirs("hf_clip", spec, params)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    convert(tmp_path / "model.safetensors", tmp_path / "ours", preset="tiny_clip")
    clip = load_clip(tmp_path / "ours")
    assert clip.spec == spec
    assert_equal_trees(clip.params, params)
    for name, values in hf_configs(spec).items():
        write_json(tmp_path / name, values)
    assert load_clip(tmp_path, preset="tiny_clip").spec == spec


def write_with(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
