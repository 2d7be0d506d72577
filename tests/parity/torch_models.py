"""The parity matrix of one format: ours -> the real library -> ours, features and every bit."""

import io
import os
from contextlib import ExitStack, contextmanager
from unittest import mock

import jax
import numpy as np
import torch
from PIL import Image

from uta_jax.data.transforms import eval_transform
from uta_jax.interop import translate
from uta_jax.interop.files import write_json, write_safetensors
from uta_jax.models.text import TextTower
from uta_jax.models.vit import Vit

# By hand, before a release: B/16 and L/14 with all their blocks instead of two.
FULL_DEPTH = bool(os.environ.get("FULL_DEPTH"))
TOLERANCE = 5e-5  # on features of length one


def random_params(spec, seed=0):
    """Parameters in which nothing is trivial: norms, biases, layer scales, positions, scale."""
    numbers = np.random.default_rng(seed).standard_normal(1_000_003, np.float32)  # a prime: no
    params = {}  # two rows are alike
    for path, shape in translate.param_shapes(spec).items():
        x = np.resize(np.roll(numbers, len(params)), shape)
        name = path.rpartition("/")[2]
        factor, start = {
            "scale": (0.3, 1.0),
            "bias": (0.1, 0.0),
            "layer_scale1": (0.2, 0.5),
            "layer_scale2": (0.2, 0.5),
            "logit_scale": (0.0, 3.7),
            "logit_bias": (0.0, -7.5),
            "pos_embed": (0.003, 0.0),  # small tokens: there the epsilon of LayerNorm counts
            "cls_token": (0.003, 0.0),
            "embedding": (0.003, 0.0),
        }.get(name, (0.03, 0.0))
        params[path] = np.asarray(start + factor * x, np.float32)
    return translate.unflatten(params)


@contextmanager
def no_draws():
    """Libraries draw weights, slowly, before they load others: here they do not."""
    names = ("normal_", "uniform_", "erfinv_")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.Tensor, name, lambda x, *_, **__: x))
        yield


def images_of(side, count=2):
    """Normalised images; the last of hardly any variance, where LayerNorm's epsilon counts."""
    images = np.random.default_rng(1).standard_normal((count, side, side, 3), np.float32)
    images[-1] = 0.1 + 1e-3 * images[-1]
    return images


def texts_of(text, count=4):
    """Token ids that end in various places."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1, text.vocab - 1, (count, text.context)).astype(np.int32)
    for row, end in zip(ids, (text.context - 1, 1, text.context // 2, 2), strict=True):
        row[end:] = 0
        row[end] = text.vocab - 1
    return ids


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def our_image_features(spec, params, images):
    vit = Vit(spec.vision)
    apply = jax.jit(lambda p, x: vit.apply({"params": p}, x, method="features"))
    return unit(apply(params["vision"], images))


def our_text_features(spec, params, ids):
    tower = TextTower(spec.text)
    return unit(jax.jit(lambda p, x: tower.apply({"params": p}, x))(params["text"], ids))


def activation(module):
    """Our name of theirs. The two GELUs differ by less than any tolerance on features."""
    tanh = getattr(module, "approximate", "none") == "tanh"
    names = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}
    return names.get(type(module).__name__, "gelu_tanh" if tanh else "gelu")


def as_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def assert_image_features(spec, params, model):
    """``model``: torch, normalised NCHW -> features."""
    images = images_of(spec.vision.image_size)
    with torch.inference_mode():
        theirs = unit(model(as_torch(images)).numpy())
    ours = our_image_features(spec, params, images)
    assert np.max(np.abs(theirs[0] - theirs[1])) > 0.01, "features do not depend on the image"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def assert_text_features(spec, params, model):
    ids = texts_of(spec.text)
    with torch.inference_mode():
        theirs = unit(model(torch.from_numpy(ids).long()).numpy())
    ours = our_text_features(spec, params, ids)
    assert np.max(np.abs(theirs[0] - theirs[1])) > 0.01, "features do not depend on the text"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def assert_same_bits(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        a, b = np.asarray(x), np.asarray(ours[name])
        assert a.shape == b.shape and a.tobytes() == b.tobytes(), name


def assert_round_trip(fmt, spec, params, state):
    """Their state dict -> ours -> theirs, and back to where it came from: bit for bit."""
    state = {name: x.numpy() for name, x in state.items()}
    again = translate.to_ours(fmt, spec, state)
    assert_same_bits(translate.flatten(params), translate.flatten(again))
    assert_same_bits(state, translate.to_theirs(fmt, spec, again))


def write(folder, fmt, spec, params, files, weights):
    """An export, as a user finds it."""
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        write_json(folder / name, values)
    write_safetensors(folder / weights, translate.to_theirs(fmt, spec, params))
    return folder


def assert_preprocessing(spec, transform):
    """``transform``: the library's own, PIL image -> normalised CHW."""
    pixels = np.random.default_rng(3).integers(0, 256, (90, 133, 3), np.uint8)
    image = Image.fromarray(np.kron(pixels, np.ones((4, 4, 1), np.uint8)))
    file = io.BytesIO()
    image.save(file, "PNG")
    ours = eval_transform(
        file.getvalue(), spec.vision.image_size, spec.resize, spec.interpolation, spec.resize_size
    )
    ours = (ours / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), transform(image).numpy(), atol=1e-5)
