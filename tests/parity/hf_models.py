"""What the tests of Hugging Face models share: weights that matter, files both ways, features."""

import numpy as np
import pytest
from jax import jit

from uta_jax.interop import translate
from uta_jax.interop.files import open_weights, write_json, write_safetensors
from uta_jax.interop.hf_config import hf_configs, hf_format, hf_spec
from uta_jax.models.text import TextTower
from uta_jax.models.vit import Vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.initialization import no_init_weights  # noqa: E402

TOLERANCE = 5e-5  # of features of length 1, in float32


def random_model(make, seed=0):
    """``make()`` with no tensor at its start: norms, biases, positions, scales all count.

    Tokens are small where they enter the blocks: there LayerNorm's epsilon counts.
    """
    generator = torch.Generator().manual_seed(seed)
    with no_init_weights():
        model = make().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            mean, std = _start(name, x)
            x.normal_(mean, std, generator=generator)
    return model


def _start(name, x):
    if name in ("logit_scale", "logit_bias"):
        return (3.7, 0.0) if name == "logit_scale" else (-9.0, 0.0)
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.3
    if "lambda1" in name:  # layer scale
        return 0.5, 0.2
    if name.endswith("bias"):
        return 0.0, 0.1
    if x.ndim == 1 or "position" in name or "embedding" in name or "_token" in name:
        return 0.0, 0.02
    return 0.0, x[0].numel() ** -0.5


def images_of(side, count=2):
    """Normalised images, the second one of hardly any variance."""
    images = np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)
    images[1] = 0.1 + 1e-3 * images[1]
    return images


def pixels(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def loaded(folder):
    """(specification, parameters) of what lies in a Hugging Face directory."""
    spec = hf_spec(folder)
    tensors = open_weights(folder / "model.safetensors")
    return spec, translate.to_ours(hf_format(spec), spec, tensors)


def saved(folder, spec, params, tokenizer_file=None):
    """The same written again, as transformers reads it."""
    folder.mkdir()
    tensors = translate.to_theirs(hf_format(spec), spec, params)
    write_safetensors(folder / "model.safetensors", tensors)
    for name, values in hf_configs(spec, tokenizer_file=tokenizer_file).items():
        write_json(folder / name, values)
    return folder


def loads_clean(kind, folder):
    """``kind.from_pretrained(folder)`` that misses nothing and has nothing left over."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def assert_same_tensors(first, second, droppable=()):
    """Two directories whose weights agree bit for bit, under the same names."""
    first, second = (open_weights(x / "model.safetensors") for x in (first, second))
    assert first.keys() == second.keys()
    for name in first.keys() - set(droppable):
        assert first[name].shape == second[name].shape, name
        a, b = np.asarray(first[name]), np.asarray(second[name])
        np.testing.assert_array_equal(a, b, err_msg=name)


def our_tokens(spec, params, images):
    """All tokens, that of the image first."""
    return np.asarray(jit(Vit(spec.vision).apply)({"params": params["vision"]}, images))


def our_text(spec, params, ids):
    return np.asarray(jit(TextTower(spec.text).apply)({"params": params["text"]}, ids))


def assert_same_features(ours, theirs):
    """Features [..., e], compared at length 1; rows that all agree would prove nothing."""
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    ours, theirs = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (ours, theirs))
    spread = np.max(np.abs(theirs[0] - theirs[1]))
    assert spread > 1e-3, f"features differ by no more than {spread} among the inputs"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
