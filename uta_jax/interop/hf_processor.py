"""``preprocessor_config.json`` and ``tokenizer_config.json`` of Hugging Face models, both ways."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from uta_jax import UserError
from uta_jax.data.tokenizer import CLEANING, open_tokenizer
from uta_jax.interop.files import read_json
from uta_jax.interop.specs import PIL_FILTERS, channels, choice
from uta_jax.models.presets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    ClipSpec,
)

HALF = (0.5, 0.5, 0.5)


class Processor(NamedTuple):
    """An image processor of theirs, and what its model was trained with."""

    name: str
    resize: str  # shortest: short side, then a centre crop; squash: both sides, and no crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    any_size: bool = False  # the crop need not be what the stored positions are for


PROCESSORS = {
    "clip": Processor("CLIPImageProcessor", "shortest", OPENAI_MEAN, OPENAI_STD),
    "siglip": Processor("SiglipImageProcessor", "squash", HALF, HALF),
    "dinov2": Processor("BitImageProcessor", "shortest", IMAGENET_MEAN, IMAGENET_STD, True),
}
# What evaluation always does, and so must an image processor, where its file names it.
STEPS = ("do_resize", "do_rescale", "do_normalize")
# In the order in which transformers itself prefers them, model by model.
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer.model")


def side(value: Any, where: str) -> int:
    """The side of a square, written as 224, [224, 224], (224, 224) or {"height": 224, ...}."""
    sides = list(value.values()) if isinstance(value, dict) else value
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if not sides or type(sides[0]) is not int or any(x != sides[0] for x in sides):
        raise UserError(f"{where}={value!r} is not square")
    if not 0 < sides[0] < 2**31:
        raise UserError(f"{where}={value!r} must be a number of pixels")
    return sides[0]


def read_processor(root: Path, kind: str, image_size: int) -> dict:
    """Fields of ClipSpec: how images become pixels; the family's own where ``root`` is silent.

    Raises UserError for pixels that ours would differ from.
    """
    where, values = _image_processor(root)
    family = PROCESSORS[kind]
    resample = values.get("resample", PIL_FILTERS["bicubic"])
    if resample not in PIL_FILTERS.values():
        raise UserError(f"{where}: resample={resample!r} must be one of {PIL_FILTERS}")
    _check_steps(values, family, where)
    mean, std = values.get("image_mean", family.mean), values.get("image_std", family.std)
    return dict(
        mean=channels(mean, f"{where}: image_mean"),
        std=channels(std, f"{where}: image_std"),
        interpolation=next(name for name, x in PIL_FILTERS.items() if x == resample),
        resize=family.resize,
        resize_size=_resize_size(values, family, image_size, where),
    )


def _image_processor(root: Path) -> tuple[Path, dict]:
    """The image processor's file and values; a section of the whole processor's, if there, wins."""
    whole, alone = root / "processor_config.json", root / "preprocessor_config.json"
    section = read_json(whole).get("image_processor") if whole.is_file() else None
    if isinstance(section, dict):
        return whole, section
    return alone, read_json(alone) if alone.is_file() else {}


def _check_steps(values: Mapping, family: Processor, where: Path) -> None:
    for step in (*STEPS, "do_center_crop"):
        wanted = step in STEPS or family.resize == "shortest"
        if values.get(step, wanted) not in ((True,) if wanted else (False, None)):
            wanted = str(wanted).lower()
            raise UserError(f"{where}: {step}={values[step]!r} must be {wanted}, or be left out")
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{where}: rescale_factor={factor!r} must be 1/255")


def _resize_size(values: Mapping, family: Processor, image_size: int, where: Path) -> int:
    """Pixels of the resized side at ``image_size``; 0 where nothing is cropped off."""
    size, crop = values.get("size", image_size), values.get("crop_size", image_size)
    if family.resize == "squash":
        crop = image_size
    elif isinstance(size, dict):
        if "shortest_edge" not in size:
            raise UserError(f"{where}: size={size!r} must give the shortest_edge, nothing else")
        size = size["shortest_edge"]
    size, crop = side(size, f"{where}: size"), side(crop, f"{where}: crop_size")
    if family.any_size and 0 < crop <= size:
        return round(size * image_size / crop) if size != crop else 0
    for name, found in (("crop_size", crop), ("size", size)):
        if found != image_size:
            raise UserError(
                f"{where}: {name} {found} is not the image_size {image_size} of config.json"
            )
    return 0


def processor_config(spec: ClipSpec, kind: str) -> dict:
    """The file of an image processor that makes the pixels ``spec`` asks for; UserError if none."""
    family, size = PROCESSORS[kind], spec.vision.image_size
    if spec.resize != family.resize or (spec.resize_size and not family.any_size):
        raise UserError(
            f"{family.name} as {kind} models have it cannot resize by {spec.resize!r} to "
            f"{spec.resize_size or size} for an input of {size}"
        )
    square = {"height": size, "width": size}
    crop = {"do_center_crop": True, "crop_size": square}
    shortest = {"shortest_edge": spec.resize_size or size}
    return {
        "image_processor_type": family.name,
        "do_resize": True,
        "size": square if family.resize == "squash" else shortest,
        "resample": PIL_FILTERS[spec.interpolation],
        **(crop if family.resize == "shortest" else {}),
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def tokenizer_name(root: Path) -> str:
    """The tokenizer's file in a directory (of weights alone: the usual name)."""
    found = [name for name in TOKENIZER_FILES if (root / name).is_file()]
    return found[0] if found else "tokenizer.json"


def cleaning(root: Path) -> str:
    """How texts are cleaned, where the class or a word of our own tells it; "": by the file."""
    where = root / "tokenizer_config.json"
    values = read_json(where) if where.is_file() else {}
    file, told = _CLASSES.get(str(values.get("tokenizer_class")), ("", ""))
    found = values.get("cleaning", "" if tokenizer_name(root) == file else told)
    choice(found, dict.fromkeys(("", *CLEANING)), f"{where}: cleaning")
    return found


# Class of transformers -> the file that it reads, and how it cleans texts.
_CLASSES = {
    "SiglipTokenizer": ("spiece.model", "siglip"),
    "Siglip2Tokenizer": ("tokenizer.json", "lower"),
}


def tokenizer_class(spec: ClipSpec, file: Path) -> tuple[str, str]:
    """The class that reads ``file`` as ours, and the cleaning of texts that it leaves to others."""
    tokenizer = open_tokenizer(file.name, file.parent, spec.text.context, spec.cleaning)
    kind = "Siglip2Tokenizer" if tokenizer.end_token == "<eos>" else "SiglipTokenizer"
    if _CLASSES[kind] == (file.name, tokenizer.cleaning):
        return kind, ""
    return "PreTrainedTokenizerFast", tokenizer.cleaning


def tokenizer_config(spec: ClipSpec, file: Path) -> dict:
    """What makes transformers' AutoTokenizer read ``file`` as ``open_tokenizer`` does.

    But for cleaning that no class of theirs does: that is recorded, and left to whoever calls it.
    """
    tokenizer = open_tokenizer(file.name, file.parent, spec.text.context)
    kind, left = tokenizer_class(spec, file)
    return {
        "tokenizer_class": kind,
        **({"cleaning": spec.cleaning} if left and spec.cleaning else {}),
        "model_max_length": spec.text.context,
        "padding_side": "right",
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": True,
        "model_input_names": ["input_ids"],
    }
