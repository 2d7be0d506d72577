"""Weights in and out: tables read both ways, strictness, and what is often found in their place."""

import json
import math
import pickle
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uta_jax import UserError
from uta_jax.interop import keymaps, translate
from uta_jax.interop.export import EXPORTS, export
from uta_jax.interop.files import WRITTEN, StoredTensor, open_weights, write_json
from uta_jax.interop.teacher import convert, load_clip, read_spec, released_spec
from uta_jax.models.presets import CLIP, VIT, ClipSpec, TextSpec, VitSpec

TEXT = TextSpec(8, 50, 24, 2, 3, 40, 20, act="gelu")
CLIP_SPEC = ClipSpec(
    VitSpec(
        24, 8, 32, 3, 4, 56, 20, act="quick_gelu", ln_eps=1e-5, embed_norm=True, patch_bias=False
    ),
    replace(TEXT, act="quick_gelu"),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
UTA_SPEC = ClipSpec(
    VitSpec(
        24, 8, 32, 3, 4, 56, 20,
        act="swiglu", qkv_bias="qv", mlp_norm=True, head_bias=True, rope_theta=10000.0,
    ),
    TEXT,
)  # fmt: skip
SPECS = {"hf": CLIP_SPEC, "uta": UTA_SPEC}


def random_params(spec, seed=0):
    rng = np.random.default_rng(seed)
    shapes = translate.param_shapes(spec)
    draw = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return translate.unflatten({path: np.asarray(x, np.float32) for path, x in draw.items()})


def assert_equal_trees(a, b):
    a, b = translate.flatten(a), translate.flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        y = np.asarray(b[path])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


def edit_json(path, **changes):
    """Change fields of a JSON file; those of a section keep the others of that section."""
    values = json.loads(path.read_text())
    for key, new in changes.items():
        merge = isinstance(new, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | new if merge else new
    write_json(path, values)


@pytest.fixture(params=EXPORTS)
def exported(request, tmp_path):
    spec = SPECS[request.param]
    export(random_params(spec), spec, request.param, tmp_path / "model", {})
    return request.param, tmp_path / "model"


@pytest.fixture
def hf_dir(tmp_path):
    export(random_params(CLIP_SPEC), CLIP_SPEC, "hf", tmp_path / "hf", {})
    return tmp_path / "hf"


# Tables


@pytest.mark.parametrize("fmt", EXPORTS)
def test_round_trip_is_bit_equal(fmt):
    layout, spec, params = EXPORTS[fmt].layout, SPECS[fmt], random_params(SPECS[fmt])
    theirs = translate.to_theirs(layout, spec, params)
    assert all(x.flags.c_contiguous and x.dtype == np.float32 for x in theirs.values())
    assert_equal_trees(params, translate.to_ours(layout, spec, theirs))


def test_convolution_layout():
    """theirs[d, c, row, col] is ours[(row * 2 + col) * 3 + c, d]."""
    rule, theirs = keymaps.RULES["conv"], np.arange(5 * 3 * 2 * 2).reshape(5, 3, 2, 2)
    ours = rule.load(theirs).reshape(12, 5)
    assert ours[(1 * 2 + 0) * 3 + 2, 4] == theirs[4, 2, 1, 0]
    np.testing.assert_array_equal(rule.save(ours), theirs)


def test_fused_matrix_is_split_and_joined():
    """One tensor of theirs, three of ours: q on top of k on top of v, each [out, in]."""
    params = random_params(UTA_SPEC)
    fused = translate.to_theirs("uta", UTA_SPEC, params)[
        "text.transformer.resblocks.1.attn.in_proj_weight"
    ]
    k = params["text"]["blocks"]["attn"]["k"]["kernel"][1]  # [24, 3, 8]
    np.testing.assert_array_equal(fused[24:48], k.reshape(24, 24).T)


@pytest.mark.parametrize(
    ("name", "keys", "vision", "text"),
    [
        ("uta_b16", 556, 86_638_336, 354_032_640),
        ("uta_l14_336", 808, 304_646_080, 354_032_640),
        ("uta_g14_336", 1144, 1_013_449_088, 354_032_640),
    ],
)
def test_released_sizes(name, keys, vision, text):
    """Key and parameter counts of the published files."""
    spec = ClipSpec(VIT[name], CLIP["eva01_g14_plus"].text)
    shapes = translate.their_shapes("uta", spec)
    buffers = 2 * (1 + spec.vision.depth)
    assert len(shapes) + buffers == keys
    count = {
        tower: sum(np.prod(s, dtype=int) for k, s in shapes.items() if k.startswith(tower))
        for tower in ("visual.", "text.")
    }
    assert count == {"visual.": vision, "text.": text}
    stored = {k: StoredTensor(shape, lambda: None) for k, shape in shapes.items()}
    assert released_spec("x.pt", stored) == spec


def test_all_key_problems_at_once():
    theirs = translate.to_theirs("uta", UTA_SPEC, random_params(UTA_SPEC))
    del theirs["logit_scale"], theirs["visual.blocks.2.mlp.w3.bias"]
    theirs["visual.blocks.3.norm1.bias"] = np.zeros(32, np.float32)
    theirs["visual.head.weight"] = np.zeros((21, 32), np.float32)
    with pytest.raises(UserError) as error:
        translate.to_ours("uta", UTA_SPEC, theirs)
    assert str(error.value) == (
        "format 'uta': 4 keys do not match: "
        "missing: logit_scale (), visual.blocks.2.mlp.w3.bias (32,); "
        "unexpected: visual.blocks.3.norm1.bias (32,); "
        "misshaped: visual.head.weight (21, 32) for (20, 32)"
    )


def test_only_named_keys_are_dropped():
    theirs = translate.to_theirs("hf_clip", CLIP_SPEC, random_params(CLIP_SPEC))
    theirs["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    translate.to_ours("hf_clip", CLIP_SPEC, theirs)
    theirs["vision_model.embeddings.other_ids"] = np.arange(10)[None]
    with pytest.raises(UserError, match="unexpected: vision_model.embeddings.other_ids"):
        translate.to_ours("hf_clip", CLIP_SPEC, theirs)


def test_tree_of_another_architecture_is_refused():
    with pytest.raises(UserError, match="parameter tree: .* missing: vision/blocks/mlp/gate/bias"):
        translate.to_theirs("uta", UTA_SPEC, random_params(CLIP_SPEC))


# Reading


def test_export_loads_as_the_same_model(exported):
    fmt, folder = exported
    clip = load_clip(folder)
    assert clip.spec == SPECS[fmt] == read_spec(folder)
    assert clip.tokenizer_context == 8
    assert_equal_trees(clip.params, random_params(SPECS[fmt]))
    assert set(clip.provenance) == {"name", "format", "sha256"}


def test_convert_keeps_everything(exported, tmp_path):
    fmt, folder = exported
    first, second = convert(folder, tmp_path / "ours"), load_clip(tmp_path / "ours")
    assert second.spec == first.spec and second.provenance == first.provenance
    assert_equal_trees(first.params, second.params)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "spec.json", "weights.safetensors",
    ]  # fmt: skip


def files_below(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_export_is_replaced_only_when_asked(exported, tmp_path):
    """By another of the same format, and by a conversion, which leaves none of its files."""
    fmt, folder = exported
    before, params = files_below(folder), random_params(SPECS[fmt], seed=1)
    with pytest.raises(UserError, match="already exists"):
        export(params, SPECS[fmt], fmt, folder, {})
    assert files_below(folder) == before
    export(params, SPECS[fmt], fmt, folder, {}, overwrite=True)
    assert_equal_trees(load_clip(folder).params, params)
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", folder, overwrite=True)
    assert {p.name for p in folder.iterdir()} == {"spec.json", "weights.safetensors"}
    assert_equal_trees(load_clip(folder).params, params)


def test_every_written_file_may_be_overwritten(exported, tmp_path):
    fmt, folder = exported
    convert(folder, tmp_path / "ours")
    assert {p.name for d in (folder, tmp_path / "ours") for p in d.iterdir()} <= WRITTEN


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("checkpoints/100/state", "checkpoints"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("model.safetensors/part", "model.safetensors"),
    ],
)
def test_overwriting_never_deletes_what_no_export_wrote(hf_dir, tmp_path, file, named):
    """A run, which also has a config.json, say."""
    run = tmp_path / "run"
    (run / file).parent.mkdir(parents=True)
    (run / file).write_text("weeks of work")
    (run / "config.json").write_text("{}")
    before = files_below(run)
    for write in (
        lambda: convert(hf_dir, run, overwrite=True),
        lambda: export(random_params(CLIP_SPEC), CLIP_SPEC, "hf", run, {}, overwrite=True),
    ):
        with pytest.raises(UserError, match=f"run: not overwritten, .* '{named}'") as error:
            write()
        assert "\n" not in str(error.value) and files_below(run) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_failed_convert_leaves_nothing(hf_dir, tmp_path):
    (hf_dir / "model.safetensors").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="empty"):
        convert(hf_dir, tmp_path / "ours")
    assert sorted(tmp_path.iterdir()) == before


def test_disk_full_while_writing(hf_dir, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uta_jax.interop.files.save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="ours: nothing written .*No space left"):
        convert(hf_dir, tmp_path / "ours")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(hf_dir, dtype):
    weights = hf_dir / "model.safetensors"
    half = {name: x.astype(dtype) for name, x in load_file(weights).items()}
    save_file(half, weights)
    scale = load_clip(hf_dir).params["vision"]["embed_norm"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, half["vision_model.pre_layrnorm.weight"])


def test_shards(hf_dir):
    weights = hf_dir / "model.safetensors"
    whole, want = load_file(weights), load_clip(hf_dir)
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(whole)}
    for shard in set(names.values()):
        save_file({k: x for k, x in whole.items() if names[k] == shard}, hf_dir / shard)
    weights.unlink()
    write_json(hf_dir / "model.safetensors.index.json", {"weight_map": names})
    assert_equal_trees(load_clip(hf_dir).params, want.params)
    (hf_dir / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1.safetensors: no such file"):
        load_clip(hf_dir)


def test_statistics_default_to_openai(hf_dir):
    (hf_dir / "preprocessor_config.json").unlink()
    spec = read_spec(hf_dir)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert spec == replace(CLIP_SPEC, mean=spec.mean, std=spec.std)


def test_another_image_size(hf_dir):
    clip = load_clip(hf_dir, image_size=32)
    assert clip.spec.vision == replace(CLIP_SPEC.vision, image_size=32)
    assert clip.params["vision"]["pos_embed"].shape == (17, 32)
    with pytest.raises(UserError, match="image_size=30 .* patch size 8 must divide"):
        load_clip(hf_dir, image_size=30)


def test_data_parallel_prefix(tmp_path):
    save_file({"module.a": np.ones(2), "module.b": np.ones(3)}, tmp_path / "x.safetensors")
    assert set(open_weights(tmp_path / "x.safetensors")) == {"a", "b"}


def test_no_torch_for_safetensors(hf_dir, tmp_path):
    code = """if True:
        import sys
        from uta_jax.interop.teacher import convert
        convert(sys.argv[1], sys.argv[2])
        heavy = {"torch", "tensorflow", "transformers", "open_clip", "timm"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code, hf_dir, tmp_path / "ours"], check=True)
    assert load_clip(tmp_path / "ours").spec == CLIP_SPEC


# What is found in the place of weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"\xff" * 64, "truncated or damaged"),
        (None, "truncated or damaged"),
    ],
)
def test_no_weights(hf_dir, content, message):
    weights = hf_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=f"model.safetensors: {message}") as error:
        load_clip(hf_dir)
    assert "\n" not in str(error.value)


def test_nan(hf_dir):
    weights = hf_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors["visual_projection.weight"][3, 4] = np.nan
    save_file(tensors, weights)
    with pytest.raises(UserError, match="hf: NaN or infinity in visual_projection.weight"):
        load_clip(hf_dir)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "bert"}, "model_type 'bert' .* nearest is 'clip'"),
        ("config.json", {"projection_dim": 21}, r"visual_projection.weight \(20, 32\) for \(21"),
        ("config.json", {"projection_dim": "big"}, "out_dim='big' is not of type int"),
        ("config.json", {"vision_config": {"hidden_act": "tanh"}}, "act 'tanh' is not supported"),
        ("config.json", {"vision_config": {"patch_size": [8, 16]}}, "is not square"),
        ("config.json", {"vision_config": {"patch_size": 0}}, "patch_size=0 must be positive"),
        ("config.json", {"vision_config": {"num_attention_heads": 7}}, "7 heads do not divide"),
        ("config.json", {"text_config": {"eos_token_id": 5}}, "eos_token_id=5 must be the last"),
        ("preprocessor_config.json", {"crop_size": 99}, "crop_size 99 is not the image_size 24"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "must be three numbers"),
        ("preprocessor_config.json", {"image_mean": [0, 0, math.nan]}, "mean .* finite numbers"),
        ("preprocessor_config.json", {"image_std": [0.2, 0.0, 0.2]}, "std .* finite numbers > 0"),
        ("preprocessor_config.json", {"image_std": [0.2, math.nan, 1]}, "std .* finite numbers"),
        ("preprocessor_config.json", {"resample": 0}, "resample=0 must be one of"),
        ("preprocessor_config.json", {"resample": 4}, "resample=4 must be one of"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize=False must be true"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale=False must be true"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop=False must be"),
        ("preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor=0.5 must be 1/255"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "rescale_factor='x' must be 1/255"),
        ("preprocessor_config.json", {"size": 32}, "size 32 is not the image_size 24"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "size 32 is not the image"),
    ],
)
def test_configuration_mistakes(hf_dir, file, changes, message):
    edit_json(hf_dir / file, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_clip(hf_dir)
    assert str(hf_dir) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [24, {"shortest_edge": 24}])
@pytest.mark.parametrize("crop_size", [24, {"height": 24, "width": 24}])
def test_image_processors_of_any_age(hf_dir, size, crop_size):
    """Early ones wrote plain numbers and left out what they always did."""
    statistics = {"image_mean": CLIP_SPEC.mean, "image_std": CLIP_SPEC.std}
    processor = {"size": size, "crop_size": crop_size, "do_resize": True, "resample": 3}
    write_json(hf_dir / "preprocessor_config.json", processor | statistics)
    assert read_spec(hf_dir) == CLIP_SPEC


def test_the_whole_processors_file(hf_dir):
    """transformers 5 saves a CLIPProcessor as one file, whose sections win over the old file."""
    alone = json.loads((hf_dir / "preprocessor_config.json").read_text())
    section = alone | {"image_mean": [0.1, 0.2, 0.3]}
    write_json(hf_dir / "processor_config.json", {"image_processor": section})
    assert read_spec(hf_dir) == replace(CLIP_SPEC, mean=(0.1, 0.2, 0.3))
    write_json(hf_dir / "processor_config.json", {"processor_class": "CLIPProcessor"})
    assert read_spec(hf_dir) == CLIP_SPEC
    write_json(hf_dir / "processor_config.json", {"image_processor": section | {"resample": 4}})
    with pytest.raises(UserError, match="processor_config.json: resample=4"):
        read_spec(hf_dir)


def test_squashed_images_are_refused(hf_dir):
    path = hf_dir / "preprocessor_config.json"
    write_json(path, {"size": {"height": 24, "width": 24}})
    with pytest.raises(UserError, match="must give the shortest_edge"):
        read_spec(hf_dir)


@pytest.mark.parametrize("name", [3, None, ["a"], "../model.safetensors"])
def test_shard_names_are_file_names(hf_dir, name):
    (hf_dir / "model.safetensors").unlink()
    names = {"a": "model-0.safetensors", "b": name}
    write_json(hf_dir / "model.safetensors.index.json", {"weight_map": names})
    with pytest.raises(UserError, match="index.json: .* is not a file name"):
        load_clip(hf_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is not supported"),
        ({"std": (0.2, 0.0, 0.2)}, "image std .* must be three finite numbers > 0"),
        ({"std": (0.2, math.nan, 0.2)}, "image std .* must be three finite numbers > 0"),
        ({"mean": (math.inf, 0.0, 0.2)}, "image mean .* must be three finite numbers"),
    ],
)
def test_statistics_on_record(hf_dir, tmp_path, changes, message):
    convert(hf_dir, tmp_path / "ours")
    edit_json(tmp_path / "ours" / "spec.json", spec=asdict(CLIP_SPEC) | changes)
    with pytest.raises(UserError, match=message):
        read_spec(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "weights are damaged"),
        ({"format": "clip"}, "format='clip' must be"),
        ({"weights": "../weights.safetensors"}, "is not a file name"),
        ({"spec": {"vision": {}}}, "spec.vision: missing depth, missing heads"),
        ({"spec": None}, "spec.vision: missing depth"),
    ],
)
def test_record_mistakes(hf_dir, tmp_path, changes, message):
    convert(hf_dir, tmp_path / "ours")
    edit_json(tmp_path / "ours" / "spec.json", **changes)
    with pytest.raises(UserError, match=message):
        load_clip(tmp_path / "ours")


def test_unknown_and_mistyped_fields(hf_dir, tmp_path):
    convert(hf_dir, tmp_path / "ours")
    spec = asdict(CLIP_SPEC)
    spec["vision"] |= {"widht": 3, "embed_norm": 1}
    edit_json(tmp_path / "ours" / "spec.json", spec=spec)
    with pytest.raises(UserError, match="unknown widht, embed_norm=1 is not of type bool"):
        read_spec(tmp_path / "ours")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such file or directory"),
        (".", "neither config.json"),
        ("asset:nothing", "no such asset"),
        ("notes.txt", "give a directory"),
        ("other.safetensors", "neither a released UTA"),
        ("broken/config.json", "give a directory"),
        ("broken", "not a readable JSON file"),
    ],
)
def test_wrong_paths(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    save_file({"a": np.ones(2)}, "other.safetensors")
    with pytest.raises(UserError, match=message):
        load_clip(path)


# .pt


class Evil:
    """Writes a file when unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pt_of_the_released_layout(tmp_path):
    torch = pytest.importorskip("torch")
    params = random_params(UTA_SPEC)
    theirs = translate.to_theirs("uta", UTA_SPEC, params)
    torch.save({k: torch.from_numpy(x) for k, x in theirs.items()}, tmp_path / "uta.pt")
    write_json(tmp_path / "uta.json", {"format": "uta", "spec": asdict(UTA_SPEC)})
    assert_equal_trees(load_clip(tmp_path / "uta.pt").params, params)
    (tmp_path / "uta.json").unlink()
    with pytest.raises(UserError, match="width 32 with patch size 8 is none of the released"):
        load_clip(tmp_path / "uta.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Evil()}, "never executed"),
        ({"args": Namespace(lr=1)}, "never executed"),
        ([1, 2], "not a bare state dict"),
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 99, "truncated or damaged"),
        (pickle.dumps({"model": Evil()}, protocol=2), "damaged"),
    ],
)
def test_pt_is_never_executed(tmp_path, monkeypatch, content, message):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("x.pt").write_bytes(content)
    else:
        torch.save(content, "x.pt")
    with pytest.raises(UserError, match=f"x.pt: .*{message}"):
        load_clip("x.pt")
    assert not Path("executed").exists()


# Export


def test_misfit_names_the_formats_that_fit(tmp_path):
    with pytest.raises(UserError, match="vision.act = 'swiglu' .*; formats that can: uta$"):
        export(random_params(UTA_SPEC), UTA_SPEC, "hf", tmp_path / "x", {})
    with pytest.raises(UserError, match="formats that can: hf$"):
        export(random_params(CLIP_SPEC), CLIP_SPEC, "uta", tmp_path / "x", {})
    with pytest.raises(UserError, match="format='onnx' must be one of: hf, uta"):
        export({}, UTA_SPEC, "onnx", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


def test_nan_is_not_exported(tmp_path):
    params = random_params(CLIP_SPEC)
    params["vision"]["cls_token"][0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in vision/cls_token"):
        export(params, CLIP_SPEC, "hf", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


def test_bad_disk_is_noticed(tmp_path, monkeypatch):
    """A write that loses one bit is no export."""

    def careless(tensors, path, **kwargs):
        tensors["visual_projection.weight"] = np.nextafter(tensors["visual_projection.weight"], 9)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("uta_jax.interop.files.save_file", careless)
    with pytest.raises(UserError, match="what was written reads differently"):
        export(random_params(CLIP_SPEC), CLIP_SPEC, "hf", tmp_path / "x", {})
    assert not list(tmp_path.iterdir())


def test_model_card(tmp_path):
    card = {"teacher": "asset:tiny_clip", "steps": 600, "licence": "apache-2.0", "top-1": "61.0%"}
    difference = export(random_params(CLIP_SPEC), CLIP_SPEC, "hf", tmp_path / "student", card)
    assert difference == 0.0
    text = (tmp_path / "student" / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n") and "# student" in text
    for word in ("asset:tiny_clip", "600", "61.0%", "24 px", "CLIPModel.from_pretrained"):
        assert word in text
