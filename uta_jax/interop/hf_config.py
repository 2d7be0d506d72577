"""The configuration files of Hugging Face, both ways."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uta_jax import UserError
from uta_jax.interop.files import read_json
from uta_jax.interop.specs import PIL_FILTERS, build, channels, checked
from uta_jax.models.presets import ClipSpec, TextSpec, VitSpec

# config.json of Hugging Face: their field -> (ours, what transformers takes where it is left out).
HF_VISION: dict[str, tuple[str, Any]] = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("mlp_hidden", 3072),
    "hidden_act": ("act", "quick_gelu"),
    "layer_norm_eps": ("ln_eps", 1e-5),
}
HF_TEXT: dict[str, tuple[str, Any]] = {
    "max_position_embeddings": ("context", 77),
    "vocab_size": ("vocab", 49408),
    "hidden_size": ("width", 512),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("heads", 8),
    "intermediate_size": ("mlp_hidden", 2048),
    "hidden_act": ("act", "quick_gelu"),
    "layer_norm_eps": ("ln_eps", 1e-5),
}
HF_MODEL_TYPES = ("clip",)
# What evaluation always does, and so must an image processor, where its file names it.
PROCESSOR_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def hf_spec(root: Path) -> ClipSpec:
    """The specification that a Hugging Face directory describes; UserError if it is not CLIP."""
    where = root / "config.json"
    config = read_json(where)
    kind = config.get("model_type")
    if kind not in HF_MODEL_TYPES:
        nearest = get_close_matches(str(kind), HF_MODEL_TYPES, 1, cutoff=0.0)[0]
        raise UserError(
            f"{where}: model_type {kind!r} is not supported; the nearest is {nearest!r}"
        )
    out_dim = config.get("projection_dim", 512)
    vision = _hf_section(config, "vision_config", HF_VISION)
    text = _hf_section(config, "text_config", HF_TEXT)
    _check_end_token(config, text["vocab"], where)
    for name in ("image_size", "patch_size"):
        vision[name] = _side(vision[name], f"{where}: vision_config.{name}")
    vision |= dict(embed_norm=True, patch_bias=False, out_dim=out_dim)
    spec = ClipSpec(
        build(VitSpec, vision, f"{where}: vision_config"),
        build(TextSpec, text | dict(out_dim=out_dim), f"{where}: text_config"),
        **_statistics(root, vision["image_size"]),
    )
    return checked(spec, str(where))


def _hf_values(config: Mapping, section: str) -> dict:
    """A section of config.json; as in transformers, its old twin ``<section>_dict`` wins."""
    values = config.get(f"{section}_dict") or config.get(section)
    return values if isinstance(values, dict) else {}


def _hf_section(config: Mapping, section: str, table: Mapping[str, tuple[str, Any]]) -> dict:
    values = _hf_values(config, section)
    return {ours: values.get(theirs, default) for theirs, (ours, default) in table.items()}


def _check_end_token(config: Mapping, vocab: int, where: Path) -> None:
    """Ours pools at the highest id; so must theirs, by that id or, where it is 2, by argmax."""
    end = _hf_values(config, "text_config").get("eos_token_id", 49407)
    if end not in (2, vocab - 1):
        raise UserError(
            f"{where}: text_config.eos_token_id={end!r} must be the last of the {vocab} tokens"
        )


def _side(value: Any, where: str) -> int:
    """The side of a square, which they write as 224, [224, 224] or {"height": 224, ...}."""
    sides = list(value.values()) if isinstance(value, dict) else value
    sides = sides if isinstance(sides, list) else [sides]
    if not sides or type(sides[0]) is not int or len(set(sides)) > 1:
        raise UserError(f"{where}={value!r} is not square")
    return sides[0]


def _statistics(root: Path, image_size: int) -> dict:
    """Image mean and std; OpenAI's where the directory does not say."""
    where, values = _image_processor(root)
    _check_processor(values, image_size, where)
    return {
        ours: channels(values[theirs], f"{where}: {theirs}")
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in values
    }


def _image_processor(root: Path) -> tuple[Path, dict]:
    """The image processor's file and values; a section of the whole processor's, if there, wins."""
    whole, alone = root / "processor_config.json", root / "preprocessor_config.json"
    section = read_json(whole).get("image_processor") if whole.is_file() else None
    if isinstance(section, dict):
        return whole, section
    return alone, read_json(alone) if alone.is_file() else {}


def _check_processor(values: Mapping, image_size: int, where: Path) -> None:
    """Refuse pixels that ours would differ from: shortest side, centre crop, / 255, normalise."""
    size = values.get("size", image_size)
    if isinstance(size, dict):
        if "shortest_edge" not in size:
            raise UserError(f"{where}: size={size!r} must give the shortest_edge, nothing else")
        size = size["shortest_edge"]
    sides = {"crop_size": values.get("crop_size", image_size), "size": size}
    for name, side in sides.items():
        if (side := _side(side, f"{where}: {name}")) != image_size:
            raise UserError(
                f"{where}: {name} {side} is not the image_size {image_size} of config.json"
            )
    resample = values.get("resample", PIL_FILTERS["bicubic"])
    if resample not in PIL_FILTERS.values():
        raise UserError(f"{where}: resample={resample!r} must be one of {PIL_FILTERS}")
    for step in PROCESSOR_STEPS:
        if values.get(step, True) is not True:
            raise UserError(f"{where}: {step}={values[step]!r} must be true, or be left out")
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{where}: rescale_factor={factor!r} must be 1/255")


def hf_configs(spec: ClipSpec, dtype: str = "float32") -> dict[str, dict]:
    """File name -> contents: the configuration of a ``CLIPModel`` and of its image processor.

    ``dtype``: that of the weights beside it.
    """
    vision = {theirs: getattr(spec.vision, ours) for theirs, (ours, _) in HF_VISION.items()}
    text = {theirs: getattr(spec.text, ours) for theirs, (ours, _) in HF_TEXT.items()}
    # CLIP's vocabulary ends with start and end of text.
    text |= dict(bos_token_id=spec.text.vocab - 2, eos_token_id=spec.text.vocab - 1)
    side = spec.vision.image_size
    model = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": spec.vision.out_dim,
        "text_config": {"model_type": "clip_text_model", **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": PIL_FILTERS[spec.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    return {"config.json": model, "preprocessor_config.json": processor}
