"""EVA-CLIP and UTA students inside open_clip, and BAAI's own files, against the real libraries."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch_models import (
    FULL_DEPTH,
    activation,
    assert_image_features,
    assert_preprocessing,
    assert_round_trip,
    assert_same_bits,
    assert_text_features,
    no_draws,
    random_params,
    write,
)

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import open_weights
from uta_jax.interop.open_clip_config import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    open_clip_configs,
    open_clip_misfits,
    open_clip_spec,
)
from uta_jax.interop.timm_config import timm_model
from uta_jax.models.presets import CLIP, VIT, ClipSpec, TextSpec

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

GOLDEN = Path(__file__).parents[1] / "golden" / "uta_released_tiny.safetensors"
TEXT = TextSpec(77, 600, 128, 2, 2, 512, 1024)


def with_text(vision, depth=0, **changes):
    vision = replace(vision, depth=depth or vision.depth)
    return ClipSpec(vision, replace(TEXT, out_dim=vision.out_dim, **changes))


_SIGLIP = CLIP["siglip_b16"]
CASES = {
    # B/16 at full depth, by the name that open_clip knows.
    "eva02_b16": ("open_clip_eva02", with_text(CLIP["eva02_b16"].vision)),
    # Towers with arguments, which open_clip finds beside the weights: fewer blocks, other sizes.
    "eva02_l14_336": (
        "open_clip_eva02",
        with_text(CLIP["eva02_l14_336"].vision, 0 if FULL_DEPTH else 2),
    ),
    "eva01_g14": ("open_clip_eva01", with_text(CLIP["eva01_g14"].vision, 2)),
    # A student with the text tower of an OpenAI teacher, and one at 336 px.
    "uta_quickgelu": ("open_clip_eva02", with_text(VIT["uta_b16"], 2, act="quick_gelu")),
    "uta_g14_336": ("open_clip_eva02", with_text(VIT["uta_g14_336"], 1)),
    # SigLIP as open_clip holds it, whose towers are GELU.
    "siglip": (
        "open_clip_siglip",
        replace(
            _SIGLIP,
            vision=replace(_SIGLIP.vision, act="gelu"),
            text=replace(_SIGLIP.text, vocab=600, depth=3),  # tanh, as SigLIP 2's
            tokenizer="clip",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_matrix(name, tmp_path):
    fmt, spec = CASES[name]
    params = random_params(spec)
    stock = ("eva02_b16", "siglip", *(["eva02_l14_336"] if FULL_DEPTH else []))
    by_name = name in stock  # open_clip knows the tower by name
    files = open_clip_configs(fmt, spec, "" if by_name else f"local-dir:{tmp_path}")
    assert files.keys() == {OPEN_CLIP_CONFIG} | (set() if by_name else {"config.json"})
    write(tmp_path, fmt, spec, params, files, OPEN_CLIP_WEIGHTS)
    assert open_clip_spec(tmp_path / OPEN_CLIP_CONFIG) == (fmt, spec)
    with no_draws():
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    assert activation(model.visual.trunk.blocks[0].mlp.act) == spec.vision.act
    assert activation(model.text.transformer.resblocks[0].mlp.gelu) == spec.text.act
    assert_image_features(spec, params, model.eval().encode_image)
    assert_text_features(spec, params, model.encode_text)
    assert_round_trip(fmt, spec, params, model.state_dict())
    assert_preprocessing(spec, transform)


BAAI = {
    "eva_clip01": ("timm_eva01", with_text(CLIP["eva01_g14"].vision, 1)),
    "eva_clip02": ("timm_eva02", with_text(CLIP["eva02_l14_336"].vision, 1)),
    "uta": ("timm_eva02", with_text(VIT["uta_b16"], 2)),
}


@pytest.mark.parametrize("fmt", BAAI)
def test_baai_files(fmt):
    """timm reads EVA's original files by itself: what it makes of ours is our tower."""
    kind, spec = BAAI[fmt]
    params = random_params(spec)
    original = translate.to_theirs(fmt, spec, params)
    name, arguments = timm_model(kind, spec)
    with no_draws():
        model = timm.create_model(name, **arguments).eval()
    tensors = {key: torch.from_numpy(x) for key, x in original.items()}
    tower = timm.models.eva.checkpoint_filter_fn(tensors, model)
    model.load_state_dict(tower, strict=True)
    assert_image_features(spec, params, model)
    assert_round_trip(fmt, spec, params, tensors)
    # And as open_clip holds the same model: the tower under another prefix, the same text.
    held = translate.to_theirs(kind.replace("timm", "open_clip"), spec, params)
    assert_same_bits(
        {f"visual.trunk.{key}": x.numpy() for key, x in tower.items()},
        {key: x for key, x in held.items() if key.startswith("visual.")},
    )
    assert_same_bits(
        {key: x for key, x in original.items() if not key.startswith("visual.")},
        {key: x for key, x in held.items() if not key.startswith("visual.")},
    )


def test_eva02_files_are_the_released_layout_and_a_norm():
    """Names and shapes of the published code of UTA, which is EVA-CLIP's without that norm."""
    vision = replace(
        CLIP["eva02_b16"].vision, image_size=64, width=64, depth=3, heads=4, mlp_hidden=170,
        out_dim=48,
    )  # fmt: skip
    spec = ClipSpec(vision, TextSpec(16, 512, 64, 2, 4, 256, 48))
    ours = translate.to_theirs("eva_clip02", spec, random_params(spec))
    shapes = {key: x.shape for key, x in ours.items()}
    norms = {key for key in shapes if ".inner_attn_ln." in key}
    assert len(norms) == 2 * 3
    released = {key: x.shape for key, x in open_weights(GOLDEN).items()}
    assert {key: shapes[key] for key in shapes.keys() - norms} == released


def test_a_student_that_open_clip_makes_by_name():
    """UTA-L at 224 px is timm's EVA-02 L, pooled at its class token."""
    spec = with_text(VIT["uta_l14"])
    config = open_clip_configs("open_clip_eva02", spec)[OPEN_CLIP_CONFIG]
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == "eva02_large_patch14_224"


def test_a_student_that_needs_arguments_says_so():
    reasons = open_clip_misfits("open_clip_eva02", with_text(VIT["uta_b16"]))
    assert len(reasons) == 1 and "by its name alone" in reasons[0]
    assert "'eva02_base_patch16_clip_224' with {'scale_attn_inner': False}" in reasons[0]
    assert not open_clip_misfits("open_clip_eva02", with_text(VIT["uta_b16"]), "hf-hub:me/mine")


def test_a_tower_elsewhere_is_not_followed(tmp_path):
    """A configuration may name any directory: only the file beside it is read."""
    spec = with_text(VIT["uta_b16"], 1)
    files = open_clip_configs("open_clip_eva02", spec, "local-dir:/somewhere/else")
    (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(files[OPEN_CLIP_CONFIG]))
    with pytest.raises(UserError, match="needs its config.json beside this file"):
        open_clip_spec(tmp_path / OPEN_CLIP_CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    assert open_clip_spec(tmp_path / OPEN_CLIP_CONFIG) == ("open_clip_eva02", spec)


def test_a_head_without_bias_fits_no_timm_tower():
    spec = with_text(replace(VIT["uta_b16"], head_bias=False))
    with pytest.raises(UserError, match="its head has a bias exactly where there is a head"):
        open_clip_configs("open_clip_eva02", spec, "local-dir:x")


def test_a_resize_before_the_crop_has_no_place():
    spec = replace(with_text(VIT["uta_b16"], 1), resize_size=256)
    with pytest.raises(UserError, match="resize_size = 256"):
        open_clip_configs("open_clip_eva02", spec, "local-dir:x")
