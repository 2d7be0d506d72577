"""timm's own models against ours: features both ways, every bit, its names and its hub files."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from torch_models import (
    activation,
    assert_image_features,
    assert_preprocessing,
    assert_round_trip,
    no_draws,
    random_params,
    write,
)

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.timm_config import (
    architecture,
    timm_configs,
    timm_model,
    timm_spec,
    tower,
)
from uta_jax.interop.timm_names import ARCHITECTURES
from uta_jax.models.presets import CLIP, VIT, ClipSpec, VitSpec

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

WEIGHTS = "model.safetensors"


def alone(vision, **pixels):
    return ClipSpec(vision, None, **pixels)


def shrunk(vision, **changes):
    """Its traits, with two narrow blocks."""
    sizes = dict(width=192, depth=2, heads=3, mlp_hidden=500)
    return replace(vision, **sizes, out_dim=64 if vision.head_proj else 192, **changes)


CASES = {
    "uta_b16": ("timm_eva02", alone(VIT["uta_b16"])),
    "eva01": ("timm_eva01", alone(shrunk(CLIP["eva01_g14"].vision))),
    "dinov2_s14": (
        "timm_vit",
        alone(replace(VIT["dinov2_s14"], image_size=224), resize_size=256, mean=(0.5, 0.4, 0.3)),
    ),
    "dinov2_g14": ("timm_vit_swiglu", alone(shrunk(VIT["dinov2_g14"], image_size=98))),
    "siglip": (
        "timm_vit",
        alone(shrunk(CLIP["siglip_b16"].vision), resize="squash", interpolation="bilinear"),
    ),
    "clip": ("timm_vit", alone(shrunk(CLIP["clip_b32"].vision, head_bias=True))),
    # What plain arguments can say beside.
    "odd_vit": (
        "timm_vit",
        alone(
            VitSpec(
                60, 12, 96, 2, 3, 250, 40, act="gelu_tanh", attn_norm=True, mlp_norm=True,
                layer_scale=True, head_bias=True,
            )
        ),
    ),
    "odd_eva": (
        "timm_eva02",
        alone(
            VitSpec(
                60, 12, 96, 2, 3, 250, 96, act="swiglu", qkv_bias="qv", mlp_norm=True,
                layer_scale=True, head_proj=False, rope_theta=100.0, rope_grid=7,
                embed_norm=True, patch_bias=False,
            )
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matrix(name, tmp_path):
    fmt, spec = CASES[name]
    params = random_params(spec)
    write(tmp_path, fmt, spec, params, timm_configs(fmt, spec), WEIGHTS)
    assert timm_spec(tmp_path) == (fmt, spec)
    known, arguments = timm_model(fmt, spec)
    assert json.loads(json.dumps(arguments)) == arguments
    assert tower(known, arguments, "x") == (fmt, spec.vision)
    with no_draws():
        model = timm.create_model(known, checkpoint_path=tmp_path / WEIGHTS, **arguments).eval()
    assert activation(model.blocks[0].mlp.act) == spec.vision.act
    assert_image_features(spec, params, model)
    assert_round_trip(fmt, spec, params, model.state_dict())


def test_the_hub_s_way(tmp_path):
    """timm makes the model of the directory alone, and prepares images as ours do."""
    fmt, spec = CASES["odd_vit"]
    params = random_params(spec)
    write(tmp_path, fmt, spec, params, timm_configs(fmt, spec), WEIGHTS)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_image_features(spec, params, model)
    assert_round_trip(fmt, spec, params, model.state_dict())


@pytest.mark.parametrize("name", ["dinov2_s14", "siglip", "uta_b16"])
def test_preprocessing(name, tmp_path):
    fmt, spec = CASES[name]
    config = timm_configs(fmt, spec)["config.json"]["pretrained_cfg"]
    config = timm.data.resolve_data_config(pretrained_cfg=config)
    assert_preprocessing(spec, timm.data.create_transform(**config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_timm_s(name):
    """Shapes, epsilons, activations and heads of one block of each architecture that we name."""
    arguments = {"num_classes": 0, "depth": 1}
    if ARCHITECTURES[name][1].pool == "avg":
        arguments["global_pool"] = "token"
    fmt, vision = tower(name, arguments, "x")
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    assert translate.their_shapes(fmt, ClipSpec(vision, None)) == shapes
    norms = [x for x in model.modules() if isinstance(x, torch.nn.LayerNorm)]
    assert {x.eps for x in norms} == {vision.ln_eps}
    assert model.blocks[0].attn.num_heads == vision.heads
    assert activation(model.blocks[0].mlp.act) == vision.act
    rope = getattr(model, "rope", None)
    assert (rope is not None) == bool(vision.rope_theta)
    if rope is not None:
        assert (rope.temperature, rope.ref_feat_shape[0]) == (vision.rope_theta, vision.rope_grid)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("vit_tiny_patch16_224", "timm_vit"), ("eva02_base_patch16_clip_224", "timm_eva02")],
)
def test_hub_files_of_timm_itself(name, fmt, tmp_path):
    """The config.json that timm writes for its hub, of a model with arguments of its own."""
    arguments = dict(img_size=64, depth=1, num_classes=40, num_heads=6)
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    timm.models._hub.save_config_for_hf(model, tmp_path / "config.json", model_args=arguments)
    kind, spec = timm_spec(tmp_path)
    vision = architecture(name, "x")[1]
    sizes = dict(image_size=64, depth=1, heads=6, out_dim=40, head_proj=True, head_bias=True)
    assert (kind, spec.vision) == (fmt, replace(vision, **sizes))
    pixels = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    pixels = timm.data.resolve_data_config(pretrained_cfg=pixels)
    assert_preprocessing(spec, timm.data.create_transform(**pixels))


WEIRD = [[], {}, "x", None, -1, 0, 1.5, True, [1], {"a": 1}, float("nan")]


@pytest.mark.parametrize("section", ["model_args", "pretrained_cfg"])
def test_any_value_is_read_or_refused(section, tmp_path):
    config = timm_configs(*CASES["odd_eva"])["config.json"]
    values = config[section] | {"num_classes": 0, "global_pool": "token"}
    for name in values:
        for weird in WEIRD:
            changed = config | {section: values | {name: weird}}
            (tmp_path / "config.json").write_text(json.dumps(changed))
            with suppress(UserError):
                timm_spec(tmp_path)


def test_students_are_one_argument_away():
    name, arguments = timm_model("timm_eva02", alone(VIT["uta_b16"]))
    assert (name, arguments) == (
        "eva02_base_patch16_clip_224",
        {"num_classes": 1024, "scale_attn_inner": False},
    )


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="the nearest is 'eva02_base_patch16_clip_224'"):
        architecture("eva02_base_patch16_clip_225", "here")
    assert architecture("vit_base_patch14_dinov2.lvd142m", "x") == architecture(
        "vit_base_patch14_dinov2", "x"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eva02_large_patch14_448", {}, "global_pool='avg' is not supported"),
        ("vit_base_patch16_224", {"reg_tokens": 4}, "reg_tokens=4 is not supported"),
        ("vit_base_patch16_224", {"qkv_bias": False}, "qkv_bias=False is not supported"),
        ("vit_base_patch16_224", {"img_size": [224, 196]}, "image_size=[224, 196] is not square"),
        ("vit_base_patch16_224", {"img_size": [224, []]}, "is not square"),
        ("vit_base_patch16_224", {"patch_size": 0}, "must be a number of pixels"),
        ("vit_base_patch16_224", {"colour": 1}, "['colour'] are not supported"),
        ("eva02_base_patch16_clip_224", {"qkv_fused": True}, "qkv_fused=True with swiglu_mlp"),
        ("eva02_base_patch16_clip_224", {"use_post_norm": True}, "use_post_norm=True is not"),
    ],
)
def test_what_is_refused_is_named(name, arguments, message):
    with pytest.raises(UserError, match="here: ") as error:
        tower(name, arguments, "here")
    assert message in str(error.value)


def test_a_text_tower_or_a_head_without_bias_does_not_fit():
    assert "it has no place for text/pos_embed" in translate.misfits("timm_vit", CLIP["clip_b32"])
    with pytest.raises(UserError, match="its head has a bias exactly where there is a head"):
        timm_model("timm_vit", CLIP["clip_b32"])
