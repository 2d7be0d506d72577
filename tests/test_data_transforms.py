"""Decoding refuses what would poison or kill a run; crops and device input are what they say."""

import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from uta_jax import UserError
from uta_jax.data.transforms import (
    decode,
    eval_transform,
    sample_crop,
    to_input,
    train_transform,
)


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_claiming(width, height):
    """A PNG header of that size with no pixels behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + b"\0\0\0\0IDAT"


JPEG = encode(noise(64, 48), "JPEG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "not an image"),
        (JPEG[:20], "not an image|broken image"),
        (JPEG[: len(JPEG) // 2], "broken image.*truncated"),
        (encode(noise(64, 48))[:-40], "broken image"),
        (png_claiming(8_100, 8_100), "8100x8100 pixels: at most 64000000"),
        (png_claiming(60_000, 60_000), "far more than the 64000000 pixels"),
        (encode(Image.new("1", (2, 4000))), "2x4000 pixels: over 50 times"),
        (encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "mode I;16: 8-bit"),
        (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "mode F: 8-bit"),
    ],
)
def test_bad_images_give_one_clear_line(data, reason):
    for transform in (
        decode,
        lambda data: eval_transform(data, 16),
        lambda data: train_transform(data, np.random.default_rng(0), 16),
    ):
        with pytest.raises(UserError, match=reason):
            transform(data)


def test_content_counts_not_the_name_and_animations_give_their_first_frame():
    first, second = noise(20, 20, 0).quantize(8), noise(20, 20, 1).quantize(8)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    pixels = np.asarray(decode(buffer.getvalue()).convert("RGB"))
    assert np.array_equal(pixels, np.asarray(first.convert("RGB")))


def test_smallest_image_and_trailing_garbage_are_fine():
    assert eval_transform(encode(Image.new("RGB", (1, 1), (9, 8, 7))), 4).tolist()[0][0] == [
        9,
        8,
        7,
    ]
    assert eval_transform(JPEG + b"garbage", 16).shape == (16, 16, 3)


def test_train_transform_depends_on_bytes_and_rng_alone():
    data = encode(noise(50, 40))
    first = train_transform(data, np.random.default_rng(5), 16)
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, train_transform(data, np.random.default_rng(5), 16))
    assert not np.array_equal(first, train_transform(data, np.random.default_rng(6), 16))


def test_flip_is_off_when_asked_and_half_the_time_otherwise():
    left_to_right = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert(
        "RGB"
    )
    data = encode(left_to_right)

    def flipped(flip, seed):
        pixels = train_transform(data, np.random.default_rng(seed), 16, flip=flip)
        return int(pixels[0, 0, 0]) > int(pixels[0, -1, 0])

    assert not any(flipped(False, seed) for seed in range(50))
    assert 60 < sum(flipped(True, seed) for seed in range(200)) < 140


def test_crops_stay_inside_and_have_the_asked_area_and_shape():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        left, top, right, bottom = sample_crop(rng, 200, 150, (0.2, 0.8), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 150
        assert 0.73 < (right - left) / (bottom - top) < 1.36
        areas.append((right - left) * (bottom - top) / (200 * 150))
    assert 0.19 < min(areas) < 0.25 and 0.7 < max(areas) < 0.81


def test_crop_of_a_thin_image_falls_back_to_its_centre():
    box = sample_crop(np.random.default_rng(0), 400, 10, (1.0, 1.0), (3 / 4, 4 / 3))
    assert box == (193, 0, 206, 10)


def test_to_input_normalises_in_float32_and_keeps_pixels_of_the_right_size():
    image_bhwc = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = to_input(image_bhwc, mean, std, 8)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (image_bhwc / 255 - mean) / std, atol=1e-6)
    assert to_input(image_bhwc, mean, std, 8, jnp.bfloat16).dtype == jnp.bfloat16


def test_to_input_resizes_like_pillow_within_rounding():
    image = noise(32, 32).resize((64, 64), Image.Resampling.BICUBIC)
    resized = to_input(np.asarray(image)[None], (0, 0, 0), (1, 1, 1), 48)[0] * 255
    pillow = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC), np.float32)
    assert (
        resized.shape == (48, 48, 3) and float(resized.min()) >= 0 and float(resized.max()) <= 255
    )
    assert np.abs(np.asarray(resized) - pillow).mean() < 0.5
