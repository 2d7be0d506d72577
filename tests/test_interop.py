"""Weights in: tables read both ways, our own record, positions at another size."""

import math
from dataclasses import asdict, replace

import ml_dtypes
import numpy as np
import pytest
from interop_models import (
    CLIP_SPEC,
    SPECS,
    UTA_SPEC,
    assert_equal_trees,
    edit_json,
    random_params,
    write_model,
)
from safetensors.numpy import load_file, save_file

from uta_jax import UserError
from uta_jax.interop import keymaps, translate
from uta_jax.interop.files import open_weights, sha256, write_json
from uta_jax.interop.find import spec_of
from uta_jax.interop.specs import spec_from_json
from uta_jax.interop.teacher import convert, load_clip, read_spec, resample_positions
from uta_jax.models.presets import CLIP, VIT, ClipSpec


@pytest.fixture(params=SPECS)
def written(request, tmp_path):
    return request.param, write_model(tmp_path / "model", request.param)


@pytest.fixture
def hf_dir(tmp_path):
    return write_model(tmp_path / "hf", "hf_clip")


# Tables


@pytest.mark.parametrize("fmt", SPECS)
def test_round_trip_is_bit_equal(fmt):
    spec, params = SPECS[fmt], random_params(SPECS[fmt])
    theirs = translate.to_theirs(fmt, spec, params)
    assert all(x.flags.c_contiguous and x.dtype == np.float32 for x in theirs.values())
    assert_equal_trees(params, translate.to_ours(fmt, spec, theirs))


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
    stored = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
    assert spec_of("x.pt", stored) == ("uta", spec)


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


@pytest.mark.parametrize("change", [dict(rope_theta=1e5), dict(rope_grid=14), dict(image_size=32)])
def test_tables_of_other_positions_are_refused(tmp_path, change):
    root = write_model(tmp_path / "x", "uta")
    tensors = load_file(root / "uta.safetensors")
    half = {name: x.astype(np.float16) if "freqs" in name else x for name, x in tensors.items()}
    translate.check_tables("uta", UTA_SPEC, half)
    extras = dict(translate._extra_names("uta", UTA_SPEC))
    other = replace(UTA_SPEC, vision=replace(UTA_SPEC.vision, **change))
    name = "visual.blocks.2.attn.rope.freqs_sin"
    tensors[name] = extras[name].make(other)
    save_file(tensors, root / "uta.safetensors")
    edit_json(root / "spec.json", sha256="")
    for read in (load_clip, lambda path: convert(path, tmp_path / "dst")):
        with pytest.raises(UserError, match=f"{name} .* rope_theta 10000, .* 3 x 3 patches"):
            read(root)


def test_tree_of_another_architecture_is_refused():
    with pytest.raises(UserError, match="parameter tree: .* missing: vision/blocks/mlp/gate/bias"):
        translate.to_theirs("uta", UTA_SPEC, random_params(CLIP_SPEC))


# Reading


def test_a_directory_loads_as_the_model_that_was_written(written):
    fmt, folder = written
    clip = load_clip(folder)
    assert clip.spec == SPECS[fmt] == read_spec(folder)
    assert clip.tokenizer_context == 8 and clip.tokenizer_file is None
    assert_equal_trees(clip.params, random_params(SPECS[fmt]))
    path = next(folder.glob("*.safetensors"))
    digest = sha256(path)
    path.unlink()  # it is known already what was read
    assert clip.provenance == {"name": "model", "format": fmt, "sha256": digest}


def test_matrices_stay_in_the_order_of_the_file(hf_dir):
    """Nothing is moved while reading: ours is a transposed view, of the whole depth at once."""
    kernel = load_clip(hf_dir).params["vision"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (3, 32, 56) and kernel.transpose(0, 2, 1).flags.c_contiguous
    assert kernel.flags.writeable and kernel.dtype == np.float32


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


def test_another_image_size(hf_dir):
    clip = load_clip(hf_dir, image_size=32)
    assert clip.spec.vision == replace(CLIP_SPEC.vision, image_size=32)
    assert clip.params["vision"]["pos_embed"].shape == (17, 32)
    with pytest.raises(UserError, match="image_size=30 .* patch size 8 must divide"):
        load_clip(hf_dir, image_size=30)


def test_data_parallel_prefix(tmp_path):
    save_file({"module.a": np.ones(2), "module.b": np.ones(3)}, tmp_path / "x.safetensors")
    assert set(open_weights(tmp_path / "x.safetensors")) == {"a", "b"}


@pytest.mark.parametrize("cls", [True, False])
def test_positions_with_and_without_cls(cls):
    """A plane stays a plane away from the border, and CLS, where there is one, stays itself."""
    row, column = np.mgrid[:8, :8].reshape(2, -1) + 0.5
    table = np.stack([row, column], axis=1).astype(np.float32)
    positions = np.concatenate([np.full((1, 2), 99, np.float32), table]) if cls else table
    bigger = resample_positions(positions, 16, cls)
    assert bigger.shape == (256 + cls, 2)
    assert not cls or (bigger[0] == 99).all()
    inner = bigger[int(cls) :].reshape(16, 16, 2)[4:12, 4:12]
    np.testing.assert_allclose(inner[..., 0], np.mgrid[4:12, 4:12][0] / 2 + 0.25, atol=1e-5)
    with pytest.raises(UserError, match="no square"):
        resample_positions(positions, 16, not cls)


# Our own record


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("vision", {"ln_eps": math.nan}, "ln_eps=nan must be a finite number > 0"),
        ("text", {"ln_eps": -1.0}, "ln_eps=-1.0 must be a finite number > 0"),
        ("vision", {"rope_theta": -1e4}, "rope_theta=-10000.0 must be a finite number >= 0"),
        ("vision", {"rope_theta": 1e4, "heads": 16}, "heads of a multiple of 4 channels, not 2"),
        ("vision", {"pool": "end"}, "pool 'end' is not supported .cls, map are"),
        ("text", {"pool": "cls"}, "pool 'cls' is not supported .end, last are"),
        ("text", {"vocab": 10**30}, "vocab=1e[+]30 is larger"),
        ("vision", {"depth": 10**30}, "depth=1e[+]30 is larger"),
        ("", {"resize_size": 5}, "resize_size=5 must be 0 or at least the image size 24"),
        ("", {"resize_size": -7}, "resize_size=-7 must be 0 or at least"),
        ("", {"cleaning": "upper"}, "cleaning 'upper' is not supported"),
    ],
)
def test_specifications_of_no_model(tower, changes, message):
    values = asdict(CLIP_SPEC)
    (values[tower] if tower else values).update(changes)
    with pytest.raises(UserError, match=message):
        spec_from_json(values, "x")


def test_an_incomplete_provenance_is_none(hf_dir, tmp_path):
    convert(hf_dir, tmp_path / "ours")
    edit_json(tmp_path / "ours" / "spec.json", source={"name": "x", "sha256": None})
    edit_json(tmp_path / "ours" / "spec.json", sha256=None)
    found = convert(tmp_path / "ours", tmp_path / "again").provenance
    assert found["name"] == "ours" and found["format"] == "uta_jax"


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
