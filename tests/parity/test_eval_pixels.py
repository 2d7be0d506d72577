"""eval_transform's other ways to resize, against open_clip's and transformers' pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from uta_jax.data.transforms import eval_transform

SIZES = [(64, 64), (97, 65), (65, 98), (130, 300), (31, 40), (24, 25)]


def encoded(width, height, mode="RGB"):
    """Smooth colour and some noise, so that resampling has something to do."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 5, y * 3, x * y], -1) + rng.integers(0, 60, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray((rgb % 256).astype(np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_open_clip(resize, interpolation, mode):
    from open_clip.transform import image_transform
    from torchvision.transforms import Normalize

    transform = image_transform(48, False, interpolation=interpolation, resize_mode=resize)
    steps = [step for step in transform.transforms if not isinstance(step, Normalize)]
    for size in SIZES:
        data = encoded(*size, mode)
        theirs = opened(data)
        for step in steps:
            theirs = step(theirs)
        theirs = np.round(theirs.numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
        ours = eval_transform(data, 48, resize=resize, interpolation=interpolation)
        assert np.array_equal(ours, theirs), size


def transformers_pixels(processor, data):
    found = processor(opened(data).convert("RGB"), do_rescale=False, do_normalize=False)
    return np.asarray(found["pixel_values"][0]).transpose(1, 2, 0)


def processor(kind, **options):
    """One of transformers' processors that resize with Pillow; the others resize with torch."""
    module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
    name = {"clip": "CLIP", "siglip": "Siglip", "bit": "Bit"}[kind]
    return getattr(module, f"{name}ImageProcessorPil")(**options)


@pytest.mark.parametrize(("interpolation", "resample"), [("bicubic", 3), ("bilinear", 2)])
def test_siglip(interpolation, resample):
    theirs = processor("siglip", size={"height": 48, "width": 48}, resample=resample)
    for size in SIZES:
        data = encoded(*size)
        ours = eval_transform(data, 48, resize="squash", interpolation=interpolation)
        assert np.array_equal(ours, transformers_pixels(theirs, data)), size


@pytest.mark.parametrize(
    ("kind", "size", "resized"), [("clip", 48, 48), ("bit", 48, 56), ("bit", 42, 64)]
)
def test_clip_and_dinov2(kind, size, resized):
    """Where the crop's margin is 3 more than a multiple of 4, theirs starts a pixel earlier."""
    theirs = processor(
        kind, size={"shortest_edge": resized}, crop_size={"height": size, "width": size}
    )
    for width, height in SIZES:
        data, short = encoded(width, height), min(width, height)
        margins = [int(resized * side / short) - size for side in (height, width)]
        y, x = (int(margin % 4 == 3) for margin in margins)
        ours = eval_transform(data, size, resize_size=resized)[: size - y, : size - x]
        assert np.array_equal(ours, transformers_pixels(theirs, data)[y:, x:]), (width, height)


def test_what_is_resized_larger_loses_its_rim():
    data = encoded(64, 64)
    whole = eval_transform(data, 64)
    assert np.array_equal(eval_transform(data, 48, resize_size=64), whole[8:56, 8:56])
