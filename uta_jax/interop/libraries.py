"""Exports as the libraries they are for load and run them, in fp32 PyTorch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uta_jax import UserError
from uta_jax.interop.files import read_json

HF_MODELS = ("CLIPModel", "SiglipModel", "Dinov2Model")


class Encoders(NamedTuple):
    """A library's model: torch tensors in, torch features [b, e] out, not normalised."""

    image: Callable[[Any], Any]  # normalised floats [b, 3, s, s]
    text: Callable[[Any], Any] | None = None  # int64 ids [b, l]; None of a vision tower alone
    tokens: Callable[[list[str]], np.ndarray] | None = None  # ids [b, l] by its own tokenizer


def _transformers(folder: Path) -> Encoders:
    import torch
    import transformers

    names = read_json(folder / "config.json").get("architectures") or [None]
    if names[0] not in HF_MODELS:
        raise UserError(f"{folder}: {names[0]!r} is none of {', '.join(HF_MODELS)}")
    kind = getattr(transformers, names[0])
    with _quiet(transformers.utils.logging):
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # transformers fills what it misses with random numbers, and only warns.
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}:
        raise UserError(f"{folder}: transformers did not load it as it is: {wrong}")
    if names[0] == "Dinov2Model":
        return Encoders(lambda x: _pooled(model(pixel_values=x)))

    def tokens(texts: list[str]) -> np.ndarray:
        read = transformers.AutoTokenizer.from_pretrained(folder)
        return read(texts, padding="max_length", truncation=True, return_tensors="np").input_ids

    return Encoders(
        lambda x: _pooled(model.get_image_features(pixel_values=x)),
        lambda ids: _pooled(model.get_text_features(input_ids=ids)),
        tokens,
    )


@contextmanager
def _quiet(logging) -> Iterator[None]:
    """No bar for a second's work, no advice on configurations that are as they should be."""
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _pooled(output):
    """transformers 5 wraps the features in an output object, 4 returned them."""
    return getattr(output, "pooler_output", output)


def _open_clip(folder: Path) -> Encoders:
    import open_clip

    name = f"local-dir:{folder}"
    model, _ = open_clip.create_model_from_pretrained(name)
    model.eval()

    def tokens(texts: list[str]) -> np.ndarray:
        return open_clip.get_tokenizer(name)(texts).numpy()

    return Encoders(model.encode_image, model.encode_text, tokens)


def _timm(folder: Path) -> Encoders:
    import timm

    name, arguments = timm_call(folder)
    model = timm.create_model(name, checkpoint_path=folder / "model.safetensors", **arguments)
    return Encoders(model.eval())


def timm_call(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which ``timm.create_model`` makes the model of ``config.json``."""
    config = read_json(folder / "config.json")
    return config["architecture"], {
        "num_classes": config["num_classes"],
        **config.get("model_args", {}),
    }


class Runner(NamedTuple):
    """Which package runs a format, under which name it is imported, and how."""

    package: str
    module: str
    load: Callable[[Path], Encoders]


# The released UTA code, which "uta" is for, is no package.
RUNNERS: dict[str, Runner] = {
    "hf": Runner("transformers", "transformers", _transformers),
    "open_clip": Runner("open_clip_torch", "open_clip", _open_clip),
    "timm": Runner("timm", "timm", _timm),
}


def missing(fmt: str) -> str:
    """Why no library here can run ``fmt``; "" where one can."""
    if fmt not in RUNNERS:
        return "the code that reads it is no installable package"
    needed = {"torch": "torch", RUNNERS[fmt].package: RUNNERS[fmt].module}
    absent = [package for package, module in needed.items() if not util.find_spec(module)]
    return f"{', '.join(absent)} not installed" if absent else ""


def library(fmt: str) -> str:
    """Name and version of the package that runs ``fmt``."""
    return f"{RUNNERS[fmt].package} {metadata.version(RUNNERS[fmt].package)}"


def load(fmt: str, folder: str | Path) -> Encoders:
    """The model in the directory ``folder``, loaded by the library of ``fmt`` alone.

    Raises UserError where the library loads something else than what is stored.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about themselves
        return RUNNERS[fmt].load(Path(folder))


def run(encode: Callable, batch: np.ndarray) -> np.ndarray:
    """``encode(batch)`` in NumPy: floats as float32, ids as int64."""
    import torch

    dtype = np.float32 if batch.dtype.kind == "f" else np.int64
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode(torch.from_numpy(np.ascontiguousarray(batch, dtype))).numpy()
