"""eval_transform is pixel-equal to open_clip's preprocessing before normalisation.

train_transform is near torchvision's, whose resizing is Pillow's: equal boxes, other libraries.
"""

import io

import numpy as np
import pytest
from PIL import Image

from uta_jax.data.bench import TorchvisionExamples, normalised
from uta_jax.data.decode import MODES, decode_jpeg
from uta_jax.data.pictures import picture
from uta_jax.data.transforms import eval_transform, jpeg_scale, sample_crop, train_transform

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


def colours(width, height, mode):
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
    data = encode(colours(*size, "RGB"))
    assert np.array_equal(eval_transform(data, target), open_clip_pixels(data, target))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # open_clip's own call
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "PA"])
def test_modes(mode):
    data = encode(colours(150, 101, mode))
    assert Image.open(io.BytesIO(data)).mode == mode
    assert np.array_equal(eval_transform(data, 64), open_clip_pixels(data, 64))


def test_jpeg_and_palette_with_transparency():
    buffer = io.BytesIO()
    colours(150, 101, "RGB").save(buffer, "JPEG")
    assert np.array_equal(
        eval_transform(buffer.getvalue(), 64), open_clip_pixels(buffer.getvalue(), 64)
    )
    buffer = io.BytesIO()
    colours(150, 101, "P").save(buffer, "PNG", transparency=3)
    assert np.array_equal(
        eval_transform(buffer.getvalue(), 64), open_clip_pixels(buffer.getvalue(), 64)
    )


@pytest.mark.parametrize("options", [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")]
                         + [{"progressive": True}])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_libjpeg_turbo_gives_pillows_pixels(options, mode):
    for width, height in ((150, 101), (16, 16), (1, 1), (33, 7)):
        buffer = io.BytesIO()
        colours(width, height, mode).save(buffer, "JPEG", **options)
        pixels = np.asarray(Image.open(buffer).convert("RGB"))
        assert np.array_equal(decode_jpeg(buffer.getvalue(), (width, height)), pixels)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB."""
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


# Size of the crop and the fraction of the size that the JPEG is decoded at for it -> the least PSNR
# in dB and the largest difference, for a picture of as much fine detail as a sharp photograph. Not
# equal: resizing rounds at other places, and libjpeg-turbo averages blocks where Pillow filters.
@pytest.mark.parametrize(
    "kind, size, scale, floor, largest",
    [
        ("PNG", 224, 1, 53, 4),
        ("JPEG", 224, 1, 53, 4),
        ("JPEG", 112, 2, 40, 16),
        ("JPEG", 56, 4, 38, 18),
        ("JPEG", 28, 8, 37, 24),
    ],
)
def test_train_crops_are_near_pillows(kind, size, scale, floor, largest):
    buffer = io.BytesIO()
    picture(np.random.default_rng(0), 500, 375).save(buffer, kind, quality=90)
    crop = {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}
    for seed in range(8):
        ours = train_transform(buffer.getvalue(), np.random.default_rng(seed), size, **crop)
        rng = np.random.default_rng(seed)
        flipped, box = rng.random() < 0.5, sample_crop(rng, 500, 375, **crop)
        assert jpeg_scale(box, size) == scale
        image = Image.open(buffer).convert("RGB").crop(box)
        theirs = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        theirs = theirs[:, ::-1] if flipped else theirs
        assert psnr(ours, theirs) > floor
        assert np.abs(ours.astype(int) - theirs).max() <= largest


def test_the_pipeline_of_the_benchmark_is_torchvisions():
    """On a picture and a box that leave nothing to chance, it gives what ours gives."""
    data = encode(colours(64, 64, "RGB"))
    theirs = TorchvisionExamples((), 64, (1.0, 1.0))
    theirs.pixels(data)  # makes the transform
    crop = theirs._transform.transforms[0]
    assert (crop.scale, crop.size) == ((1.0, 1.0), (64, 64))
    crop.ratio = (1.0, 1.0)
    pixels = theirs.pixels(data).numpy().transpose(1, 2, 0)
    ours = normalised(train_transform(data, np.random.default_rng(0), 64, (1, 1), (1, 1), False))
    assert any(np.allclose(pixels, p, atol=1e-5) for p in (ours, ours[:, ::-1]))
