"""``transformers.Dinov2Model`` against ours: every token both ways, files both ways, pixels."""

from dataclasses import replace

import hf_models
import pytest

from uta_jax import UserError
from uta_jax.interop.files import read_json
from uta_jax.interop.hf_config import hf_configs, hf_spec
from uta_jax.models.presets import VIT, ClipSpec

torch, transformers = hf_models.torch, hf_models.transformers

MODELS = {
    "dinov2_s14": dict(image_size=336, hidden_size=384, num_attention_heads=6),
    # The giant with its fused SwiGLU at a quarter of its width; positions as all of them have.
    "dinov2_g14": dict(
        image_size=518, hidden_size=384, num_attention_heads=6, num_hidden_layers=2,
        use_swiglu_ffn=True,
    ),
}  # fmt: skip
RUNS_AT_224 = dict(size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406])
RUNS_AT_224 |= dict(image_std=[0.229, 0.224, 0.225])


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The name, a model of theirs, its directory, and what we make of it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.Dinov2Config(**MODELS[request.param])
    model = hf_models.random_model(lambda: transformers.Dinov2Model(config))
    model.save_pretrained(folder)
    transformers.BitImageProcessor(**RUNS_AT_224).save_pretrained(folder)
    return request.param, model, folder, *hf_models.loaded(folder)


@pytest.fixture(scope="module")
def exported(both, tmp_path_factory):
    return hf_models.saved(tmp_path_factory.mktemp("out") / "hf", *both[3:])


def last_hidden_state(model, images):
    with torch.inference_mode():
        return model(hf_models.pixels(images)).last_hidden_state


def test_specification(both):
    name, _, _, spec, _ = both
    small = dict(width=384, depth=2, heads=6, mlp_hidden=1024, out_dim=384)
    changes = dict(image_size=336) if name == "dinov2_s14" else small
    assert spec.vision == replace(VIT[name], **changes) and spec.text is None
    assert spec.mean == (0.485, 0.456, 0.406) and spec.resize == "shortest"
    # 256 and a crop of 224, said of the size that the positions are for
    assert spec.resize_size * 224 == 256 * spec.vision.image_size


def test_tokens_both_ways(both, exported):
    """The class token and every patch's; export: theirs, made of what we wrote."""
    _, model, _, spec, params = both
    images = hf_models.images_of(spec.vision.image_size)
    theirs = last_hidden_state(model, images)
    hf_models.assert_same_features(hf_models.our_tokens(spec, params, images), theirs)
    again = hf_models.loads_clean(transformers.Dinov2Model, exported)
    torch.testing.assert_close(last_hidden_state(again, images), theirs, rtol=0, atol=0)


def test_round_trip(both, exported):
    """All but the token for masked patches, which no finished model sees: it comes back as 0."""
    _, model, folder, spec, _ = both
    hf_models.assert_same_tensors(folder, exported, droppable=["embeddings.mask_token"])
    assert hf_spec(exported) == spec
    ours, theirs = transformers.Dinov2Config.from_pretrained(exported).to_dict(), model.config
    assert {k for k, x in theirs.to_dict().items() if x != ours[k]} <= {"dtype"}


def test_image_processor(both, exported):
    """Theirs at the size of the positions shows as much of an image as the original at 224."""
    spec = both[3]
    ours = transformers.BitImageProcessor.from_pretrained(exported)
    assert ours.crop_size["height"] == spec.vision.image_size
    assert ours.size["shortest_edge"] == spec.resize_size
    theirs = read_json(both[2] / "preprocessor_config.json")
    written = read_json(exported / "preprocessor_config.json")
    assert {k for k in theirs if theirs[k] != written[k]} == {"size", "crop_size"}


def tiny(folder, **changes):
    config = transformers.Dinov2Config(
        image_size=28, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, **changes
    )
    model = hf_models.random_model(lambda: transformers.Dinov2Model(config))
    model.save_pretrained(folder)
    images = hf_models.images_of(28)
    return images, last_hidden_state(model, images), *hf_models.loaded(folder)


def test_biases_may_be_missing(tmp_path):
    images, theirs, spec, params = tiny(tmp_path, qkv_bias=False)
    assert spec.vision.qkv_bias == ""
    hf_models.assert_same_features(hf_models.our_tokens(spec, params, images), theirs)
    assert hf_spec(hf_models.saved(tmp_path / "again", spec, params)) == spec


def test_a_swapped_gate_would_be_noticed(tmp_path):
    """Two halves of one matrix: exchanged, they give another model of the same shapes."""
    images, theirs, spec, params = tiny(tmp_path, use_swiglu_ffn=True)
    mlp = params["vision"]["blocks"]["mlp"]
    mlp["up"], mlp["gate"] = mlp["gate"], mlp["up"]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        hf_models.assert_same_features(hf_models.our_tokens(spec, params, images), theirs)


def test_a_hidden_layer_without_a_ratio():
    spec = ClipSpec(replace(VIT["dinov2_s14"], mlp_hidden=1000), None)
    with pytest.raises(UserError, match="no whole mlp_ratio gives vision.mlp_hidden = 1000"):
        hf_configs(spec)
