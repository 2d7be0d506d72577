"""open_clip's own models against ours: features both ways, every bit, preprocessing, configs."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch_models import (
    FULL_DEPTH,
    TOLERANCE,
    activation,
    assert_image_features,
    assert_preprocessing,
    assert_round_trip,
    assert_text_features,
    images_of,
    no_draws,
    our_image_features,
    our_text_features,
    random_params,
    texts_of,
    write,
)

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.open_clip_config import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    model_spec,
    open_clip_configs,
    open_clip_spec,
)
from uta_jax.models.presets import CLIP, ClipSpec, TextSpec

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

CONFIGS = Path(open_clip.__file__).parent / "model_configs"


def library_config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def small_text(spec, vocab=600, depth=3):
    return replace(spec, text=replace(spec.text, vocab=vocab, depth=depth))


def cut(spec, depth=2):
    if FULL_DEPTH:
        return small_text(spec)
    return small_text(replace(spec, vision=replace(spec.vision, depth=depth)), depth=depth)


_B16 = CLIP["clip_b16"]
CASES = {
    # QuickGELU, full depth; GELU; 336 px; and everything that a configuration can say otherwise.
    "b32_quickgelu": ("open_clip", small_text(CLIP["clip_b32"], depth=12)),
    "b16_gelu": (
        "open_clip_text",
        cut(
            replace(
                _B16, vision=replace(_B16.vision, act="gelu"), text=replace(_B16.text, act="gelu")
            )
        ),
    ),
    "l14_336": ("open_clip", cut(CLIP["clip_l14_336"])),
    "odd": (
        "open_clip_text",
        ClipSpec(
            replace(
                _B16.vision, image_size=48, width=128, depth=2, heads=4, mlp_hidden=300,
                out_dim=40, act="gelu_tanh", ln_eps=1e-6, embed_norm=False,
            ),
            TextSpec(
                16, 600, 96, 2, 3, 200, 40, act="gelu", ln_eps=1e-4, causal=False, pool="last"
            ),
            mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", resize="squash",
            logit_bias=True,
        ),
    ),
}  # fmt: skip


def loud(spec):
    """Parameters whose MLPs say so much that the two GELUs differ by more than the tolerance."""
    flat = translate.flatten(random_params(spec))
    factors = {"mlp/up/kernel": 2, "mlp/down/kernel": 30}
    for path in flat:
        flat[path] = flat[path] * np.float32(factors.get("/".join(path.split("/")[-3:]), 1))
    return translate.unflatten(flat)


@pytest.mark.parametrize("name", CASES)
def test_matrix(name, tmp_path):
    fmt, spec = CASES[name]
    params = loud(spec) if name == "odd" else random_params(spec)
    write(tmp_path, fmt, spec, params, open_clip_configs(fmt, spec), OPEN_CLIP_WEIGHTS)
    assert open_clip_spec(tmp_path / "open_clip_config.json") == (fmt, spec)
    with no_draws():
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    text = model.text if fmt == "open_clip_text" else model
    for act, tower in ((spec.vision.act, model.visual), (spec.text.act, text)):
        assert activation(tower.transformer.resblocks[0].mlp.gelu) == act
    assert_image_features(spec, params, model.eval().encode_image)
    assert_text_features(spec, params, model.encode_text)
    assert_round_trip(fmt, spec, params, model.state_dict())
    assert_preprocessing(spec, transform)


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("change", [{"act": "quick_gelu"}, {"ln_eps": 1e-5}])
def test_tolerance_would_notice(tower, change):
    """What kills parity silently, an activation or an epsilon, is far outside of it."""
    _, spec = CASES["odd"]
    spec = replace(spec, text=replace(spec.text, ln_eps=1e-3))
    params = random_params(spec)
    wrong = replace(spec, **{tower: replace(getattr(spec, tower), **change)})
    inputs, features = {
        "vision": (images_of(48), our_image_features),
        "text": (texts_of(spec.text), our_text_features),
    }[tower]
    assert np.max(np.abs(features(spec, params, inputs) - features(wrong, params, inputs))) > 2e-4


def test_tolerance_tells_the_gelus_apart():
    """With the parameters that the matrix compares the odd case with."""
    _, spec = CASES["odd"]
    params = loud(spec)
    vision = replace(spec, vision=replace(spec.vision, act="gelu"))
    text = replace(spec, text=replace(spec.text, act="gelu_tanh"))
    for inputs, features, wrong in (
        (images_of(48), our_image_features, vision),
        (texts_of(spec.text), our_text_features, text),
    ):
        difference = features(spec, params, inputs) - features(wrong, params, inputs)
        assert np.max(np.abs(difference)) > TOLERANCE


@pytest.mark.parametrize(
    ("name", "preset", "act"),
    [
        ("ViT-B-32-quickgelu", "clip_b32", "quick_gelu"),
        ("ViT-B-16", "clip_b16", "gelu"),
        ("ViT-L-14-336-quickgelu", "clip_l14_336", "quick_gelu"),
        ("EVA01-g-14", "eva01_g14", None),
        ("EVA01-g-14-plus", "eva01_g14_plus", None),
        ("EVA02-B-16", "eva02_b16", None),
        ("EVA02-L-14", "eva02_l14", None),
        ("EVA02-L-14-336", "eva02_l14_336", None),
    ],
)
def test_the_library_s_own_configs_are_the_presets(name, preset, act):
    expected = CLIP[preset]
    if act:
        towers = {x: replace(getattr(expected, x), act=act) for x in ("vision", "text")}
        expected = replace(expected, **towers)
    fmt, spec = model_spec(library_config(name), None, name)
    assert spec == expected
    again = open_clip_configs(fmt, spec)["open_clip_config.json"]
    assert model_spec(again["model_cfg"], again["preprocess_cfg"], name) == (fmt, spec)


def test_siglip_configs_name_their_tokenizer():
    fmt, spec = model_spec(library_config("ViT-B-16-SigLIP2"), None, "x")
    assert (fmt, spec.tokenizer, spec.logit_bias) == ("open_clip_siglip", "tokenizer.json", True)
    text = open_clip_configs(fmt, spec)["open_clip_config.json"]["model_cfg"]["text_cfg"]
    assert text == library_config("ViT-B-16-SigLIP2")["text_cfg"]
    assert (spec.cleaning, text["tokenizer_kwargs"]) == ("open_clip", {"clean": "canonicalize"})


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_cfg", {"patch_dropout": 0.5}, "patch_dropout=0.5 is not supported"),
        ("vision_cfg", {"ls_init_value": 1e-4}, "ls_init_value=0.0001 is not supported"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool=True is not supported"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "pos_embed_type='sin_cos_2d' is not"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type='avg' is not supported"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "is a ResNet"),
        ("vision_cfg", {"patch_sise": 16}, "the nearest is 'patch_dropout'"),
        ("vision_cfg", {"timm_model_name": "eva02_base_patch16_clip_448"}, "_clip_224'"),
        ("vision_cfg", {"timm_model_name": "convnext_base"}, "is not supported; the nearest is"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        (
            "text_cfg",
            {"pool_type": "eos"},
            "pool_type='eos' is not supported (it must be one of: argmax, last)",
        ),
        ("text_cfg", {"hf_tokenizer_name": "a/b"}, "tokenizer_kwargs.clean='whitespace' is not"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "must be one of: lower)"),
        ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}, "only clean is"),
        ("text_cfg", {"norm_kwargs": {"bias": False}}, "only eps is"),
        (None, {"multimodal_cfg": {}}, "CoCa is not supported"),
        (None, {"embed_dim": None}, "embed_dim=None must be a positive number"),
    ],
)
def test_what_is_refused_is_named(section, change, message):
    config = library_config("ViT-B-16")
    (config[section] if section else config).update(change)
    with pytest.raises(UserError, match="here: .*") as error:
        model_spec(config, None, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["EVA02-B-16", "ViT-B-16-SigLIP2", "ViT-B-32-quickgelu"])
def test_any_value_is_read_or_refused(name, tmp_path):
    config = open_clip_configs(*model_spec(library_config(name), None, name))[OPEN_CLIP_CONFIG]
    sections = [
        config["preprocess_cfg"],
        *(config["model_cfg"][x] for x in ("vision_cfg", "text_cfg")),
    ]
    for values in sections:
        for key, right in list(values.items()):
            for weird in ([], {}, "x", None, -1, 0, 1.5, True, [1], {"a": 1}, float("nan")):
                values[key] = weird
                (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(config))
                with suppress(UserError):
                    open_clip_spec(tmp_path / OPEN_CLIP_CONFIG)
            values[key] = right


def test_a_timm_tower_without_pooling_is_refused():
    """An empty name is not the tower's own pooling: it would give every token."""
    config = library_config("EVA02-B-16")
    config["vision_cfg"]["timm_pool"] = ""
    with pytest.raises(UserError, match="global_pool='' is not supported"):
        model_spec(config, None, "x")
    config["vision_cfg"]["timm_pool"] = None
    assert model_spec(config, None, "x")[1].vision.pool == "cls"


def test_harmless_flags_are_read():
    config = library_config("ViT-B-16")
    config["text_cfg"] |= {"xattn": True, "fusedLN": True, "output_tokens": True}
    assert model_spec(config, None, "x") == model_spec(library_config("ViT-B-16"), None, "x")


def test_quick_gelu_in_one_tower_alone_has_no_switch():
    spec = replace(_B16, vision=replace(_B16.vision, act="gelu"))
    with pytest.raises(UserError, match="both or neither"):
        open_clip_configs("open_clip", spec)
