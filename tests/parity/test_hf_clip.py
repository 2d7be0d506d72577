"""``transformers.CLIPModel`` and open_clip against ours: features both ways, positions, exports."""

import os
from dataclasses import replace
from types import SimpleNamespace

import hf_models
import numpy as np
import pytest

from uta_jax import UserError
from uta_jax.interop.export import export, hf_features
from uta_jax.interop.files import read_json, write_json
from uta_jax.interop.hf_config import hf_spec
from uta_jax.interop.teacher import convert, load_clip, resample_positions

torch, transformers = hf_models.torch, hf_models.transformers

TINY = dict(
    vision_config=dict(
        image_size=48, patch_size=16, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=160, hidden_act="gelu", layer_norm_eps=1e-6,
    ),
    text_config=dict(
        max_position_embeddings=12, vocab_size=300, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=96, hidden_act="quick_gelu",
        bos_token_id=298, eos_token_id=299,
    ),
    projection_dim=40,
)  # fmt: skip
# openai/clip-vit-base-patch32, which transformers' defaults are; a shorter vocabulary.
BASE_32 = dict(
    vision_config={}, text_config=dict(vocab_size=500, bos_token_id=498, eos_token_id=499)
)
LARGE_14_336 = dict(
    vision_config=dict(
        image_size=336, patch_size=14, hidden_size=1024,
        num_hidden_layers=24 if os.environ.get("FULL_DEPTH") else 2,
        num_attention_heads=16, intermediate_size=4096,
    ),
    text_config=dict(
        vocab_size=500, hidden_size=768, num_hidden_layers=2, num_attention_heads=12,
        intermediate_size=3072, bos_token_id=498, eos_token_id=499,
    ),
    projection_dim=768,
)  # fmt: skip


def random_clip(config):
    return hf_models.random_model(lambda: transformers.CLIPModel(transformers.CLIPConfig(**config)))


def some_inputs(config):
    """Normalised images, one of hardly any variance, and texts that end in various places."""
    rng = np.random.default_rng(0)
    side = config.vision_config.image_size
    images = rng.normal(size=(3, side, side, 3)).astype(np.float32)
    images[1] = 0.1 + 1e-3 * images[1]
    context, last = config.text_config.max_position_embeddings, config.text_config.vocab_size - 1
    ids = rng.integers(1, last, (4, context))
    for row, end in zip(ids, (context - 1, 1, context // 2, 2), strict=True):
        row[end:] = 0
        row[end] = last
    return images, ids.astype(np.int32)


def their_features(model, images, ids):
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=torch.from_numpy(ids).long()).pooler_output
    return image.numpy(), text.numpy()


def our_features(clip, images, ids):
    tokens = hf_models.our_tokens(clip.spec, clip.params, images)
    return tokens[:, 0], hf_models.our_text(clip.spec, clip.params, ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf_tiny")
    model = random_clip(TINY)
    model.save_pretrained(folder)
    return model, folder


def test_tiny_features(tiny):
    model, folder = tiny
    assert_same_features(model, load_clip(folder))


@pytest.mark.parametrize("config", [BASE_32, LARGE_14_336], ids=["base_32", "large_14_336"])
def test_full_width_features(tmp_path, config):
    model = random_clip(config)
    model.save_pretrained(tmp_path)
    assert_same_features(model, load_clip(tmp_path))


def assert_same_features(model, clip):
    assert clip.params["logit_scale"] == np.float32(3.7)
    images, ids = some_inputs(model.config)
    theirs, ours = their_features(model, images, ids), our_features(clip, images, ids)
    for name, a, b in zip(("image", "text"), theirs, ours, strict=True):
        assert np.std(a) > 0.1, "features too small for an absolute tolerance to mean anything"
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("change", [{"act": "quick_gelu"}, {"ln_eps": 1e-5}])
def test_tolerance_would_notice(tiny, change):
    """What kills parity silently, an activation or an epsilon, is far outside of it."""
    model, folder = tiny
    clip = load_clip(folder)
    images, ids = some_inputs(model.config)
    theirs, _ = their_features(model, images, ids)
    spec = replace(clip.spec, vision=replace(clip.spec.vision, **change))
    ours, _ = our_features(replace(clip, spec=spec), images, ids)
    assert np.max(np.abs(ours - theirs)) > 1e-3


def test_export_gives_every_tensor_back(tiny, tmp_path):
    """transformers -> ours -> our own directory -> transformers: bit for bit, and it runs."""
    model, folder = tiny
    convert(folder, tmp_path / "ours")
    clip = load_clip(tmp_path / "ours")
    assert export(clip.params, clip.spec, "hf", tmp_path / "hf", {}).reread == 0.0
    again = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    theirs = model.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    for name, x in again.state_dict().items():
        assert torch.equal(x, theirs[name]), name
    for config in ("vision_config", "text_config"):
        a, b = (getattr(m.config, config).to_dict() for m in (again, model))
        assert {k: a[k] for k in TINY[config]} == {k: b[k] for k in TINY[config]}


def test_hf_features_of_an_export(tiny, tmp_path):
    """uint8 in, the exported statistics applied, as our own towers see it."""
    _, folder = tiny
    clip = load_clip(folder)
    export(clip.params, clip.spec, "hf", tmp_path / "hf", {})
    images = np.random.default_rng(1).integers(0, 256, (5, 48, 48, 3), np.uint8)
    ids = np.full((2, 12), 299, np.int32)
    image, text = hf_features(tmp_path / "hf", [images[:3], images[3:]], [ids])
    normalised = ((images / 255 - clip.spec.mean) / clip.spec.std).astype(np.float32)
    for a, b in zip((image, text), our_features(clip, normalised, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert [x.shape for x in hf_features(tmp_path / "hf")] == [(0, 40), (0, 40)]


def test_exported_preprocessor_is_theirs(tiny, tmp_path):
    """The image processor of transformers reads our file, and ours theirs."""
    _, folder = tiny
    clip = load_clip(folder)
    export(clip.params, clip.spec, "hf", tmp_path / "hf", {})
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 48 and processor.size["shortest_edge"] == 48
    assert tuple(processor.image_mean) == clip.spec.mean
    assert tuple(processor.image_std) == clip.spec.std


def test_a_vocabulary_of_its_own_is_refused(tiny, tmp_path):
    """Its texts would be read as CLIP's byte pairs. A vocabulary that is no number, too."""
    for file in tiny[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hf_spec(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "vocab.json", {})
    with pytest.raises(UserError, match="vocab.json: a tokenizer of .* is not supported"):
        hf_spec(tmp_path)
    config["text_config"]["vocab_size"] = "1000"
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="vocab='1000' is not of type int"):
        hf_spec(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards(tmp_path, dtype):
    model = random_clip(TINY).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    kernel = load_clip(tmp_path).params["vision"]["blocks"]["mlp"]["up"]["kernel"]
    layers = model.float().vision_model.encoder.layers
    theirs = np.stack([x.mlp.fc1.weight.detach().T for x in layers])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, theirs)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (7, 12), (14, 14), (24, 7)])
def test_positions_as_open_clip(old, new):
    positions = np.random.default_rng(0).normal(size=(1 + old * old, 6)).astype(np.float32)
    theirs = open_clip_positions(torch.from_numpy(positions.copy()), new)
    np.testing.assert_allclose(resample_positions(positions, new), theirs, rtol=0, atol=1e-5)


def test_another_image_size(tiny):
    """The whole tower at twice the size it was saved at, its positions resampled."""
    model, folder = tiny
    clip = load_clip(folder, image_size=96)
    assert clip.spec.vision.grid == 6
    vision_config = TINY["vision_config"] | {"image_size": 96}
    config = transformers.CLIPConfig(**TINY | {"vision_config": vision_config})
    name, state = "vision_model.embeddings.position_embedding.weight", model.state_dict()
    bigger = transformers.CLIPModel(config).eval()
    bigger.load_state_dict(state | {name: open_clip_positions(state[name].clone(), 6)})
    images, ids = some_inputs(config)
    theirs, ours = their_features(bigger, images, ids), our_features(clip, images, ids)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=2e-5)


def open_clip_positions(positions, grid):
    from open_clip.model import resize_pos_embed

    state = {"visual.positional_embedding": positions}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    return state["visual.positional_embedding"]
