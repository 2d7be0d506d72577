"""A model as a directory that another library loads by itself, and the proof of it."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from uta_jax import UserError
from uta_jax.data.tokenizer import CLEANING, CLIP_NAME, CLIP_VOCAB, open_tokenizer
from uta_jax.interop import keymaps, libraries, translate
from uta_jax.interop.files import whole_dir, write_json, write_safetensors
from uta_jax.interop.hf_config import hf_configs, hf_spec
from uta_jax.interop.hf_processor import tokenizer_class, tokenizer_config
from uta_jax.interop.open_clip_config import open_clip_configs
from uta_jax.interop.teacher import load_clip, write_recorded
from uta_jax.interop.timm_config import timm_configs, timm_model
from uta_jax.models.encode import encode_images, encode_texts
from uta_jax.models.presets import ClipSpec

Configs = dict[str, dict]  # file name -> contents


class Place(NamedTuple):
    """What configuration files say beside the architecture."""

    dtype: str = "float32"  # of the weights
    tokenizer_file: Path | None = None
    home: str = "local-dir:."  # where the directory will lie, for files that must name it


class Target(NamedTuple):
    """An export format: its tables in ``keymaps``, its files, and how it is loaded."""

    layouts: tuple[str, ...]  # the first that fits is written
    weights: str
    usage: str
    configs: Callable[[str, ClipSpec, "Place"], Configs]
    text: bool = True  # False: the vision tower alone


def _open_clip_configs(layout: str, spec: ClipSpec, place: Place) -> Configs:
    files = open_clip_configs(layout, spec, place.home)
    if spec.tokenizer != "clip" and place.tokenizer_file is not None:
        files["tokenizer_config.json"] = tokenizer_config(spec, place.tokenizer_file)
    return files


EXPORTS: dict[str, Target] = {
    "hf": Target(
        ("hf_clip", "hf_siglip", "hf_dinov2", "hf_dinov2_swiglu"),
        "model.safetensors",
        "from transformers import {model}\nmodel = {model}.from_pretrained(DIRECTORY)",
        lambda layout, spec, place: hf_configs(spec, place.dtype, place.tokenizer_file),
    ),
    "open_clip": Target(
        ("open_clip", "open_clip_text", "open_clip_eva01", "open_clip_eva02", "open_clip_siglip"),
        "open_clip_model.safetensors",
        "import open_clip\nname = 'local-dir:' + DIRECTORY\n"
        "model, preprocess = open_clip.create_model_from_pretrained(name)\n"
        "tokenizer = open_clip.get_tokenizer(name)",
        _open_clip_configs,
    ),
    "timm": Target(
        ("timm_vit", "timm_vit_swiglu", "timm_eva01", "timm_eva02"),
        "model.safetensors",
        "import timm\nmodel = timm.create_model(\n    {name!r},\n"
        "    checkpoint_path=DIRECTORY + '/model.safetensors',\n{arguments})",
        lambda layout, spec, place: timm_configs(layout, spec),
        text=False,
    ),
    "uta": Target(
        ("uta",),
        "uta.safetensors",
        "from safetensors.torch import load_file\n"
        "model.load_state_dict(load_file(DIRECTORY + '/uta.safetensors'))  # jihaonew/UTA",
        lambda layout, spec, place: {},
    ),
}

# Largest difference of L2-normalised features that a library may show, in fp32, from the model that
# was exported. Half-precision weights are rounded, so their model is another one by that much.
LIMITS = {"float32": 5e-5, "float16": 5e-3}


class Exported(NamedTuple):
    """What was proved of an export."""

    layout: str
    reread: float  # largest difference of a tensor from what was to be written: 0
    difference: float | None  # of the library's normalised features from ours; None: was not run
    limit: float
    by: str  # the library that ran it, or why none did

    def __str__(self) -> str:
        if self.difference is None:
            return f"not run in its library: {self.by}"
        return f"{self.by} agrees within {self.difference:.1e} (allowed {self.limit:g})"


def fitting_formats(spec: ClipSpec) -> list[str]:
    """The export formats that can hold ``spec``."""
    return [fmt for fmt in EXPORTS if _layout(fmt, _held(fmt, spec))[0]]


def export(
    params: Mapping,
    spec: ClipSpec,
    fmt: str,
    out_dir: str | Path,
    card: Mapping[str, Any],
    overwrite: bool = False,
    dtype: str = "float32",
    tokenizer_file: Path | None = None,
    home: str = "",
) -> Exported:
    """Write {"vision", "text", "logit_scale", ...} as format ``fmt``, read it again, run it.

    Every tensor read back must be what was written, and the library that ``fmt`` is for, where it
    is installed, must give our features within ``LIMITS[dtype]``.

    Args:
      card: lines of the model card: teacher, data, steps, licence, zero-shot figures.
      dtype: of the stored weights, float32 or float16.
      tokenizer_file: the file that ``spec.tokenizer`` names, to lie beside the weights.
      home: "local-dir:PATH" or "hf-hub:ORG/NAME", where the directory will lie; by default where it
        is written. open_clip finds the arguments of some towers by it.

    Raises UserError where the architecture does not fit, naming the formats that do, where
    ``out_dir`` exists without ``overwrite``, or a check fails; ``out_dir`` appears whole or not.
    """
    if home and not home.startswith(("local-dir:", "hf-hub:")):
        raise UserError(f"home={home!r} must be local-dir:PATH or hf-hub:ORG/NAME")
    layout, spec, params = _fitted(fmt, spec, params)
    target, absent = EXPORTS[fmt], libraries.missing(fmt)
    probe = None if absent else _Probe(spec, params)
    if dtype != "float32":
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    with whole_dir(Path(out_dir), overwrite) as work:
        tensors = translate.to_theirs(layout, spec, params)
        tensors = {name: x.astype(dtype, copy=False) for name, x in tensors.items()}
        if fmt == "uta":
            made = {"card": {key: str(value) for key, value in card.items()}}
            write_recorded(work, layout, target.weights, tensors, spec, made)
        else:
            write_safetensors(work / target.weights, tensors)
        del tensors  # a model's worth of memory, which reading it again needs
        if tokenizer_file is not None and spec.text is not None:
            shutil.copyfile(tokenizer_file, work / tokenizer_file.name)
        here = Place(dtype, tokenizer_file, f"local-dir:{work}")
        _write_configs(work, target.configs(layout, spec, here))
        reread = _reread(work, params, spec)
        encoders = libraries.load(fmt, work) if probe else None
        difference = probe.difference(encoders) if probe else None
        done = Exported(layout, reread, difference, LIMITS[dtype], absent or libraries.library(fmt))
        _check_difference(fmt, done)
        card = {**card, **_check_tokens(fmt, spec, tokenizer_file, encoders)}
        there = here._replace(home=home or f"local-dir:{Path(out_dir).resolve()}")
        files = target.configs(layout, spec, there)
        _write_configs(work, files)
        if there.home in json.dumps(files):
            card = {**card, "must lie at": f"{there.home}, or where timm_model_name then says"}
        text = model_card(Path(out_dir).name, fmt, spec, card, done)
        (work / "README.md").write_text(text, encoding="utf-8")
    return done


def _write_configs(folder: Path, files: Configs) -> None:
    for name, values in files.items():
        write_json(folder / name, values)


def _check_difference(fmt: str, done: Exported) -> None:
    if done.difference is not None and not done.difference <= done.limit:
        raise UserError(
            f"format={fmt!r}: {done.by} computes other features than ours (difference "
            f"{done.difference:.1e}, allowed {done.limit:g}): nothing written"
        )


# What fits where


def _held(fmt: str, spec: ClipSpec) -> ClipSpec:
    """What of ``spec`` the format is about, said in the one way that its files say it."""
    if spec.resize_size == spec.vision.image_size:
        spec = replace(spec, resize_size=0)
    if fmt not in EXPORTS or EXPORTS[fmt].text:
        return spec
    # timm's head has a bias; one of zeros is the same head.
    vision = replace(spec.vision, head_bias=spec.vision.head_proj)
    return replace(spec, vision=vision, text=None, logit_bias=False, tokenizer="clip")


def _layout(fmt: str, spec: ClipSpec) -> tuple[str, list[str]]:
    """The first layout of ``fmt`` that holds ``spec``; else "" and why the nearest does not."""
    reasons = {}
    for layout in EXPORTS[fmt].layouts:
        against = translate.misfits(layout, spec)
        try:
            if not against:
                EXPORTS[fmt].configs(layout, spec, Place())
                return layout, []
        except UserError as error:
            against = [str(error)]
        reasons[layout] = against
    return "", min(reasons.values(), key=len)


def _fitted(fmt: str, spec: ClipSpec, params: Mapping) -> tuple[str, ClipSpec, Mapping]:
    if fmt not in EXPORTS:
        raise UserError(f"format={fmt!r} must be one of: {', '.join(EXPORTS)}")
    held = _held(fmt, spec)
    layout, reasons = _layout(fmt, held)
    if not layout:
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise UserError(
            f"format={fmt!r} cannot hold this model: {'; '.join(reasons[:4])}{more}; "
            f"formats that can: {', '.join(fitting_formats(spec)) or 'none'}"
        )
    if not EXPORTS[fmt].text:
        params = {"vision": params["vision"]}
    if held.vision.head_bias and not spec.vision.head_bias:
        head = params["vision"]["head"]
        proj = head["proj"] | {"bias": np.zeros(spec.vision.out_dim, np.float32)}
        params = {"vision": params["vision"] | {"head": head | {"proj": proj}}}
    return layout, held, params


# The proof


def _reread(work: Path, params: Mapping, spec: ClipSpec) -> float:
    """Load what was written as any other checkpoint: the same model must come back."""
    again = load_clip(work)
    if replace(again.spec, tokenizer=spec.tokenizer, cleaning=spec.cleaning) != spec:
        raise OSError(f"came back as another architecture: {again.spec}")
    flat = translate.flatten(again.params)
    difference = max(
        float(np.max(np.abs(flat[path] - np.asarray(leaf))))
        for path, leaf in translate.flatten(params).items()
    )
    if difference != 0.0:
        raise OSError(f"came back with a difference of {difference}")
    return difference


class _Probe:
    """Fixed images and texts, and what the model to be exported makes of them."""

    def __init__(self, spec: ClipSpec, params: Mapping):
        rng, side = np.random.default_rng(0), spec.vision.image_size
        self.image_bhwc = rng.normal(size=(3, side, side, 3)).astype(np.float32)
        self.image_bhwc[2] = 0.3 + 1e-3 * self.image_bhwc[2]  # where a careless variance is zero
        self.ids_bl = None if spec.text is None else _ids(spec, rng)
        self.ours = [np.asarray(encode_images(params["vision"], self.image_bhwc, spec=spec))]
        if spec.text is not None:
            features = encode_texts(params["text"], self.ids_bl, spec=spec.text)
            self.ours.append(np.asarray(features))

    def difference(self, encoders: libraries.Encoders) -> float:
        """Largest absolute difference of the library's normalised features from ours."""
        theirs = [libraries.run(encoders.image, self.image_bhwc.transpose(0, 3, 1, 2))]
        if self.ids_bl is not None:
            theirs.append(libraries.run(encoders.text, self.ids_bl))
        pairs = zip(self.ours, theirs, strict=True)
        return max(float(np.abs(_unit(a) - _unit(b)).max()) for a, b in pairs)


def _ids(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Texts of all lengths [3, l]; framed and filled up with zeros where CLIP's are."""
    context, vocab = spec.text.context, spec.text.vocab
    ids_bl = rng.integers(3, vocab - 2, (3, context), np.int32)
    if spec.text.pool == "end":
        ids_bl[:, 0] = vocab - 2
        for row, end in zip(ids_bl, (1, context // 2, context - 1), strict=True):
            row[end], row[end + 1 :] = vocab - 1, 0
    return ids_bl


# Case, punctuation, an underscore: where tokenizers clean differently; and one to be cut.
TEXTS = ("A cat.", "Two dogs, 12 o'clock (really)!", "under_score: 'x' & y", "a cat, a dog " * 99)


def _has_tokenizer(fmt: str, spec: ClipSpec, file: Path | None) -> bool:
    """Whether the library finds a tokenizer with the export."""
    if spec.text is None or libraries.missing("hf" if file else fmt):  # files: by transformers
        return False
    if spec.tokenizer == CLIP_NAME:  # built into open_clip; transformers wants files
        return fmt == "open_clip" and spec.text.vocab == CLIP_VOCAB
    return file is not None


def _check_tokens(fmt: str, spec: ClipSpec, file: Path | None, encoders) -> dict[str, str]:
    """For the card; UserError where the library reads ``TEXTS`` as other tokens than ours."""
    if encoders is None or not _has_tokenizer(fmt, spec, file):
        return {}
    texts, folder = list(TEXTS), file and file.parent
    ours = open_tokenizer(spec.tokenizer, folder, spec.text.context, spec.cleaning)
    left = tokenizer_class(spec, file)[1] if fmt == "hf" else ""
    cleaned = [CLEANING[left](text) for text in texts] if left else texts
    if not np.array_equal(ours(texts), encoders.tokens(cleaned)):
        raise UserError(
            f"format={fmt!r}: {libraries.library(fmt)} reads texts as other tokens than ours by "
            f"{spec.tokenizer!r}: nothing written"
        )
    before = f", if they are cleaned before ({left!r} of uta_jax/data/tokenizer.py)" if left else ""
    return {"texts in the library": f"the same tokens{before}"}


def _unit(x_be: np.ndarray) -> np.ndarray:
    return x_be / np.linalg.norm(x_be, axis=-1, keepdims=True)


# For people


def model_card(name: str, fmt: str, spec: ClipSpec, card: Mapping[str, Any], done: Exported) -> str:
    """Markdown: where the model comes from, what it expects, how it is loaded, what was checked."""
    made = "trained" if "steps" in card else "converted"
    kind = "A vision tower" if spec.text is None else "A CLIP"
    size = spec.vision.image_size
    resize = {"shortest": "short side", "squash": "both sides"}[spec.resize]
    expects = {
        "image": f"{size} px; {resize} resized to {spec.resize_size or size} px "
        f"({spec.interpolation}), central crop",
        "mean, std": f"{spec.mean}, {spec.std}",
        "text": _reads(fmt, spec),
        "layout": keymaps.FORMATS[done.layout].title,
        "difference after writing": f"{done.reread:g}",
        "features in the library": str(done),
    }
    if fmt == "hf" and spec.resize == "shortest":
        expects["crop"] = (
            "transformers begins it a pixel earlier than was evaluated, where a resized side is "
            "4k + 3 pixels longer than the crop"
        )
    licence = card.get("licence", "")
    stated = {"licence": licence or "not stated: that of what it was made from applies"}
    lines = {**card, **stated, **expects}.items()
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in lines]
    front = [f"license: {json.dumps(str(licence))}"] if licence else []
    lines = ["---", *front, "tags: [clip, uta-jax]", "---", f"# {name}", ""]
    lines += [f"{kind}, {made} by uta-jax.", "", "| | |", "|---|---|", *rows]
    return "\n".join([*lines, "", "```python", _usage(fmt, done.layout, spec), "```", ""])


def _reads(fmt: str, spec: ClipSpec) -> str:
    if spec.text is None:
        return "none"
    kind = "CLIP byte pairs" if spec.tokenizer == CLIP_NAME else spec.tokenizer
    if (fmt, spec.tokenizer) == ("hf", CLIP_NAME):
        kind += " (the tokenizer of openai/clip-vit-base-patch32: none lies here)"
    return f"{kind}, {spec.text.context} tokens"


def _cell(value: Any) -> str:
    """One line that cannot leave its place in the table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _usage(fmt: str, layout: str, spec: ClipSpec) -> str:
    usage = EXPORTS[fmt].usage
    if fmt == "hf":
        return usage.format(model=hf_configs(spec)["config.json"]["architectures"][0])
    if fmt == "timm":
        name, arguments = timm_model(layout, spec)
        lines = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
        return usage.format(name=name, arguments=lines)
    return usage


def hf_features(
    export_dir: str | Path,
    images: Iterable[np.ndarray] = (),
    texts: Iterable[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Features as transformers computes them from a Hugging Face export, in fp32 PyTorch.

    ``images``: uint8 batches [b, h, w, 3] at the model's size, normalised here with the statistics
    that were exported. ``texts``: batches of token ids [b, l]. Returns image and text features
    [n, e], projected and not normalised; zero rows of what was not given. Needs the torch extra.
    """
    encoders, spec = libraries.load("hf", export_dir), hf_spec(Path(export_dir))
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    pixels = ((np.asarray(batch, np.float32) / 255 - mean) / std for batch in images)
    image_rows = [libraries.run(encoders.image, x.transpose(0, 3, 1, 2)) for x in pixels]
    text_rows = [libraries.run(encoders.text, ids_bl) for ids_bl in texts]
    none = np.zeros((0, spec.vision.out_dim), np.float32)
    return np.concatenate([none, *image_rows]), np.concatenate([none, *text_rows])
