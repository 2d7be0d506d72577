"""A trained model as a directory that another library loads by itself, and the proof of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from uta_jax import UserError
from uta_jax.interop import translate
from uta_jax.interop.files import read_json, whole_dir, write_json, write_safetensors
from uta_jax.interop.hf_config import hf_configs
from uta_jax.interop.teacher import load_clip, write_recorded
from uta_jax.models.presets import ClipSpec


class Target(NamedTuple):
    """An export format: its table in ``keymaps``, its weights file, and how it is loaded."""

    layout: str
    weights: str
    usage: str


EXPORTS: dict[str, Target] = {
    "hf": Target(
        "hf_clip",
        "model.safetensors",
        "from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(DIRECTORY)",
    ),
    "uta": Target(
        "uta",
        "uta.safetensors",
        "from safetensors.torch import load_file\n"
        "model.load_state_dict(load_file(DIRECTORY + '/uta.safetensors'))  # jihaonew/UTA",
    ),
}


def fitting_formats(spec: ClipSpec) -> list[str]:
    """The export formats that can hold ``spec``."""
    return [fmt for fmt, to in EXPORTS.items() if not translate.misfits(to.layout, spec)]


def export(
    params: Mapping,
    spec: ClipSpec,
    fmt: str,
    out_dir: str | Path,
    card: Mapping[str, Any],
    overwrite: bool = False,
    dtype: str = "float32",
) -> float:
    """Write {"vision", "text", "logit_scale"} as format ``fmt``; the re-read difference (0).

    ``dtype``: of the stored weights; with float16 they are rounded first, and the rounded weights
    are what must come back.

    ``out_dir`` appears whole or not at all, with a model card that lists ``card`` (teacher, data,
    steps, licence, zero-shot figures). Raises UserError where the architecture does not fit, naming
    the formats that do, or ``out_dir`` exists without ``overwrite``.
    """
    target = _target(fmt, spec)
    if dtype != "float32":
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    with whole_dir(Path(out_dir), overwrite) as work:
        tensors = translate.to_theirs(target.layout, spec, params)
        tensors = {name: x.astype(dtype, copy=False) for name, x in tensors.items()}
        if fmt == "hf":
            write_safetensors(work / target.weights, tensors)
            for name, values in hf_configs(spec, dtype).items():
                write_json(work / name, values)
        else:
            made = {"card": {key: str(value) for key, value in card.items()}}
            write_recorded(work, target.layout, target.weights, tensors, spec, made)
        del tensors  # a model's worth of memory, which reading it again needs
        difference = _reread(work, params, spec)
        text = model_card(Path(out_dir).name, target, spec, card, difference)
        (work / "README.md").write_text(text, encoding="utf-8")
    return difference


def model_card(
    name: str, target: Target, spec: ClipSpec, card: Mapping[str, Any], difference: float
) -> str:
    """Markdown for people: where the model comes from, what it expects, how it is loaded."""
    licence = [f"license: {card['licence']}"] if "licence" in card else []
    expects = {
        "image": f"{spec.vision.image_size} px, {spec.interpolation} resize, centre crop",
        "mean, std": f"{spec.mean}, {spec.std}",
        "text": f"CLIP byte pairs, {spec.text.context} tokens",
        "difference after writing": f"{difference:g}",
    }
    rows = [f"| {key} | {value} |" for key, value in {**card, **expects}.items()]
    lines = ["---", *licence, "tags: [clip, uta-jax]", "---", f"# {name}", ""]
    lines += ["A CLIP trained by uta-jax.", "", "| | |", "|---|---|", *rows]
    return "\n".join([*lines, "", "```python", target.usage, "```", ""])


def hf_features(
    export_dir: str | Path,
    images: Iterable[np.ndarray] = (),
    texts: Iterable[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Features as ``transformers.CLIPModel`` computes them from an export, in fp32 PyTorch.

    ``images``: uint8 batches [b, h, w, 3] at the model's size, normalised here with the statistics
    that were exported. ``texts``: batches of token ids [b, l]. Returns image and text features
    [n, e], projected and not normalised; zero rows of what was not given. Needs the torch extra.
    """
    import torch

    model = _hf_model(export_dir)
    statistics = read_json(Path(export_dir) / "preprocessor_config.json")
    mean, std = (np.asarray(statistics[f"image_{x}"], np.float32) for x in ("mean", "std"))
    image_rows, text_rows = [], []
    with torch.inference_mode():
        for batch in images:
            x_bhwc = (np.asarray(batch, np.float32) / 255 - mean) / std
            x_bchw = torch.from_numpy(np.ascontiguousarray(x_bhwc.transpose(0, 3, 1, 2)))
            image_rows.append(_pooled(model.get_image_features(pixel_values=x_bchw)))
        for batch in texts:
            ids_bl = torch.from_numpy(np.asarray(batch, np.int64))
            text_rows.append(_pooled(model.get_text_features(input_ids=ids_bl)))
    none = np.zeros((0, model.config.projection_dim), np.float32)
    return np.concatenate([none, *image_rows]), np.concatenate([none, *text_rows])


def _hf_model(export_dir: str | Path):
    import torch
    import transformers
    from transformers import CLIPModel

    transformers.utils.logging.disable_progress_bar()  # a second's work
    model, report = CLIPModel.from_pretrained(
        export_dir, dtype=torch.float32, output_loading_info=True
    )
    # transformers fills what it misses with random numbers, and only warns.
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}:
        raise UserError(f"{export_dir}: transformers did not load it as it is: {wrong}")
    return model


def _pooled(output) -> np.ndarray:
    """transformers 5 wraps the features in an output object, 4 returned them."""
    return getattr(output, "pooler_output", output).numpy()


def _target(fmt: str, spec: ClipSpec) -> Target:
    if fmt not in EXPORTS:
        raise UserError(f"format={fmt!r} must be one of: {', '.join(EXPORTS)}")
    if reasons := translate.misfits(EXPORTS[fmt].layout, spec):
        fitting = ", ".join(fitting_formats(spec)) or "none"
        raise UserError(
            f"format={fmt!r} cannot hold this model: {'; '.join(reasons)}; "
            f"formats that can: {fitting}"
        )
    return EXPORTS[fmt]


def _reread(work: Path, params: Mapping, spec: ClipSpec) -> float:
    """Load what was written as any other checkpoint: the same model must come back."""
    again = load_clip(work)
    if again.spec != spec:
        raise OSError(f"came back as another architecture: {again.spec}")
    flat = translate.flatten(again.params)
    difference = max(
        float(np.max(np.abs(flat[path] - np.asarray(leaf))))
        for path, leaf in translate.flatten(params).items()
    )
    if difference != 0.0:
        raise OSError(f"came back with a difference of {difference}")
    return difference
