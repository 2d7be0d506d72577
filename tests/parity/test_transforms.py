"""eval_transform is pixel-equal to open_clip's preprocessing before normalisation."""

import io

import numpy as np
import pytest
from PIL import Image

from uta_jax.data.transforms import MODES, eval_transform

SIZES = [
    (64, 64),
    (224, 224),
    (97, 65),
    (65, 97),
    (333, 500),
    (31, 40),
    (17, 340),
    (1, 1),
    (225, 224),
]
KIND = {"CMYK": "TIFF", "YCbCr": "TIFF", "PA": None}  # the file format that can hold the mode


def picture(width, height, mode):
    """Smooth colour and some noise, so that resampling has something to do."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    rgba = np.stack([x * 5, y * 3, x * y, 40 + x + y], -1) + rng.integers(0, 60, (height, width, 4))
    return Image.fromarray((rgba % 256).astype(np.uint8)).convert("RGBA").convert(mode)


def encode(image):
    buffer = io.BytesIO()
    image.save(buffer, KIND.get(image.mode, "PNG"))
    return buffer.getvalue()


def open_clip_pixels(data, size):
    from open_clip.transform import image_transform
    from torchvision.transforms import Normalize

    transform = image_transform(size, is_train=False)
    pixels = Image.open(io.BytesIO(data))
    for step in transform.transforms:
        if not isinstance(step, Normalize):
            pixels = step(pixels)
    return np.round(pixels.numpy() * 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [64, 224])
def test_sizes(size, target):
    data = encode(picture(*size, "RGB"))
    assert np.array_equal(eval_transform(data, target), open_clip_pixels(data, target))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # open_clip's own call
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "PA"])
def test_modes(mode):
    data = encode(picture(150, 101, mode))
    assert Image.open(io.BytesIO(data)).mode == mode
    assert np.array_equal(eval_transform(data, 64), open_clip_pixels(data, 64))


def test_jpeg_and_palette_with_transparency():
    buffer = io.BytesIO()
    picture(150, 101, "RGB").save(buffer, "JPEG")
    assert np.array_equal(
        eval_transform(buffer.getvalue(), 64), open_clip_pixels(buffer.getvalue(), 64)
    )
    buffer = io.BytesIO()
    picture(150, 101, "P").save(buffer, "PNG", transparency=3)
    assert np.array_equal(
        eval_transform(buffer.getvalue(), 64), open_clip_pixels(buffer.getvalue(), 64)
    )
