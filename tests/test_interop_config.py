"""``config.json`` and the image processor's file: what is read, and every mistake by name."""

import json
import math
from dataclasses import replace

import pytest
from interop_models import CLIP_SPEC, edit_json, write_model

from uta_jax import UserError
from uta_jax.interop.files import write_json
from uta_jax.interop.teacher import load_clip, read_spec


@pytest.fixture
def hf_dir(tmp_path):
    return write_model(tmp_path / "hf", "hf_clip")


def test_statistics_default_to_openai(hf_dir):
    (hf_dir / "preprocessor_config.json").unlink()
    spec = read_spec(hf_dir)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert spec == replace(CLIP_SPEC, mean=spec.mean, std=spec.std)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "bert"}, "model_type 'bert' .* nearest is 'clip'"),
        ("config.json", {"projection_dim": 21}, r"visual_projection.weight \(20, 32\) for \(21"),
        ("config.json", {"projection_dim": "big"}, "out_dim='big' is not of type int"),
        ("config.json", {"vision_config": {"hidden_act": "tanh"}}, "act 'tanh' is not supported"),
        ("config.json", {"vision_config": {"patch_size": [8, 16]}}, "is not square"),
        ("config.json", {"vision_config": {"patch_size": 0}}, "patch_size=0 must be "),
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
