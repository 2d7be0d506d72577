"""``transformers.SiglipModel`` against ours: features both ways, files both ways, pixels."""

from dataclasses import replace

import hf_models
import numpy as np
import pytest

from uta_jax import UserError
from uta_jax.interop.files import read_json, write_json
from uta_jax.interop.hf_config import hf_configs, hf_spec
from uta_jax.models.presets import CLIP

torch, transformers = hf_models.torch, hf_models.transformers

# Full architectures but for the vocabulary and, of the second, the depth.
MODELS = {
    "siglip_b16": dict(vision_config={}, text_config=dict(vocab_size=500)),
    "siglip2_b16_336": dict(
        vision_config=dict(image_size=336, num_hidden_layers=2),
        text_config=dict(vocab_size=500, num_hidden_layers=2, projection_size=768),
    ),
}
FILTER = {"siglip_b16": 3, "siglip2_b16_336": 2}  # of PIL: bicubic, bilinear


def features(model, images, ids):
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=hf_models.pixels(images)).pooler_output
        text = model.get_text_features(input_ids=torch.from_numpy(ids).long()).pooler_output
    return image, text


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The name, a model of theirs, its directory, and what we make of it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.SiglipConfig(**MODELS[request.param])
    model = hf_models.random_model(lambda: transformers.SiglipModel(config))
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    transformers.SiglipImageProcessor(
        size={"height": side, "width": side}, resample=FILTER[request.param]
    ).save_pretrained(folder)
    return request.param, model, folder, *hf_models.loaded(folder)


@pytest.fixture(scope="module")
def inputs(both):
    spec = both[3]
    ids = np.random.default_rng(1).integers(2, spec.text.vocab, (3, spec.text.context), np.int32)
    for row, end in zip(ids, (63, 1, 20), strict=True):
        row[end:] = 1  # SigLIP ends and pads with the same token
    return hf_models.images_of(spec.vision.image_size), ids


@pytest.fixture(scope="module")
def exported(both, tmp_path_factory):
    return hf_models.saved(tmp_path_factory.mktemp("out") / "hf", *both[3:])


def test_specification(both):
    name, _, _, spec, params = both
    preset = CLIP["siglip_b16" if name == "siglip_b16" else "siglip2_b16"]
    depth = spec.vision.depth
    size = {"siglip_b16": 224, "siglip2_b16_336": 336}[name]
    assert spec.vision == replace(preset.vision, image_size=size, depth=depth)
    assert spec.text == replace(preset.text, vocab=500, depth=depth)
    assert replace(spec, vision=preset.vision, text=preset.text) == replace(
        preset, interpolation="bicubic" if name == "siglip_b16" else "bilinear"
    )
    assert params["logit_scale"].shape == params["logit_bias"].shape == ()


def test_features_both_ways(both, inputs, exported):
    """Import: our towers on their weights. Export: theirs, made of what we wrote."""
    _, model, _, spec, params = both
    image, text = features(model, *inputs)
    hf_models.assert_same_features(hf_models.our_tokens(spec, params, inputs[0])[:, 0], image)
    hf_models.assert_same_features(hf_models.our_text(spec, params, inputs[1]), text)
    again = hf_models.loads_clean(transformers.SiglipModel, exported)
    for a, b in zip(features(again, *inputs), (image, text), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert again.logit_bias.item() == float(params["logit_bias"])


def test_round_trip(both, exported):
    _, model, folder, spec, _ = both
    hf_models.assert_same_tensors(folder, exported)
    assert hf_spec(exported) == spec
    ours, theirs = transformers.SiglipConfig.from_pretrained(exported), model.config
    for section in ("vision_config", "text_config"):
        ours_values, values = (getattr(x, section).to_dict() for x in (ours, theirs))
        unused = {"bos_token_id", "eos_token_id", "dtype"}
        assert {k for k in values if values[k] != ours_values[k]} <= unused


def test_image_processor(both, exported):
    """The same values, and so the same pixels, as the file that transformers wrote."""
    folder = both[2]
    ours, theirs = (read_json(x / "preprocessor_config.json") for x in (exported, folder))
    assert ours == theirs
    image = np.random.default_rng(2).integers(0, 256, (90, 140, 3), np.uint8)
    a, b = (
        transformers.SiglipImageProcessor.from_pretrained(x)(image, return_tensors="pt")
        for x in (exported, folder)
    )
    assert torch.equal(a.pixel_values, b.pixel_values)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tower = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )  # fmt: skip
    config = transformers.SiglipConfig(
        vision_config=tower | dict(image_size=32), text_config=tower | dict(vocab_size=60)
    )
    model = hf_models.random_model(lambda: transformers.SiglipModel(config))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, *hf_models.loaded(folder)


@pytest.mark.parametrize("change", [{"act": "gelu"}, {"ln_eps": 1e-5}])
def test_tolerance_would_notice(tiny, change):
    """The other GELU and the other usual epsilon lie outside of what passes above."""
    model, spec, params = tiny
    images = hf_models.images_of(32)
    image, _ = features(model, images, np.ones((1, 64), np.int32))
    hf_models.assert_same_features(hf_models.our_tokens(spec, params, images)[:, 0], image)
    wrong = replace(spec, vision=replace(spec.vision, **change))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        hf_models.assert_same_features(hf_models.our_tokens(wrong, params, images)[:, 0], image)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"vision_config": {"vision_use_head": False}}, "vision_use_head must be"),
        ("config.json", {"vision_config": {"image_size": [32, []]}}, "is not square"),
        ("config.json", {"model_type": []}, "model_type .. is not supported"),
        ("config.json", {"model_type": "siglip2"}, "nearest is 'siglip'"),
        ("config.json", {"text_config": {"hidden_act": "relu"}}, "act 'relu' is not supported"),
        ("preprocessor_config.json", {"size": {"height": 9, "width": 8}}, "is not square"),
        ("preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "size 9 is not the"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop=True must be false"),
    ],
)
def test_mistakes(tmp_path, file, changes, message):
    for name, values in hf_configs(CLIP["siglip_b16"]).items():
        write_json(tmp_path / name, values | (changes if name == file else {}))
    with pytest.raises(UserError, match=message) as error:
        hf_spec(tmp_path)
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


def test_a_shortest_side_is_not_for_siglip():
    with pytest.raises(UserError, match="SiglipImageProcessor .* cannot resize by 'shortest'"):
        hf_configs(replace(CLIP["siglip_b16"], resize="shortest"))
