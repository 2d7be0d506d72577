"""Encoded bytes to pixels on the host, and uint8 pixels to network input on the device.

Evaluation follows the CLIP teachers (OpenAI CLIP, open_clip) to the last bit: Pillow resizes and
crops in the image's own mode and converts to RGB. Training decides on its random box from the
header, decodes an ordinary JPEG down to the box's last row at the smallest fraction of its size
that still holds every pixel asked for, and resizes with the same antialiased bicubic filter from a
faster library. Images that are neither ordinary JPEGs nor of mode RGB are resized as in evaluation.
What is decoded at all, and that EXIF orientation is ignored, is told in decode.py, for both.

JAX is imported where it is used: the processes that decode need none.
"""

from __future__ import annotations

import math
import threading
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from PIL import Image

from uta_jax.data.decode import SCALES, decode, decode_jpeg, jpeg_size

if TYPE_CHECKING:
    import jax

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)  # a = -1/2, antialiased, as Pillow's
WHOLE = ResizeOptions(BICUBIC)  # of all pixels of an image
_thread = threading.local()


def sample_crop(
    rng: Random,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) as in Inception (Szegedy et al. 2015, section 6).

    Its share of the area is uniform in `scale`, the logarithm of its width / height uniform in log
    `ratio`. After 10 boxes that stick out, the largest central box whose shape lies within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        shape = math.exp(low + (high - low) * rng.random())
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int((width - w + 1) * rng.random())
            top = int((height - h + 1) * rng.random())
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_transform(
    data: bytes,
    rng: Random,
    size: int,
    scale: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    *,
    allow_truncated: bool = False,
) -> np.ndarray:
    """Random resized crop (bicubic) and horizontal flip: uint8 [size, size, 3], not to be written.

    Always draws from rng in the same order, so the result depends on (data, rng state) alone.

    Args:
      scale, ratio: as in sample_crop.
      allow_truncated: as in decode.

    Raises:
      BadExample: as decode.
    """
    flipped = flip and rng.random() < 0.5
    header = jpeg_size(data)
    image = None if header else decode(data, allow_truncated)
    box = sample_crop(rng, *(header or image.size), scale, ratio)
    if header:
        reduction = jpeg_scale(box, size)
        # Blue first where rows are to be read backwards: that gives the mirrored row, red first.
        order = "BGR" if flipped else "RGB"
        pixels = decode_jpeg(data, header, reduction, order, not allow_truncated, bottom=box[3])
        if pixels is not None:
            pixels = _resized(pixels, tuple(side / reduction for side in box), size)
            return _backwards(pixels) if flipped else pixels
        image = decode(data, allow_truncated)
    if image.mode == "RGB":
        pixels = _resized(np.asarray(image), box, size)
    else:
        pixels = _rgb(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flipped else pixels


def _backwards(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, c] with the bytes of every row in reverse: mirrored, last channel first."""
    rows = pixels.reshape(len(pixels), -1)
    # Whole words at a time where they fit, four times as fast as bytes.
    word = np.dtype(next(f"u{size}" for size in (8, 4, 2, 1) if rows.shape[1] % size == 0))
    swapped = rows.view(word.newbyteorder())[:, ::-1]
    return swapped.astype(word).view(np.uint8).reshape(pixels.shape)


def jpeg_scale(box: tuple[int, int, int, int], size: int) -> int:
    """The largest n of 8, 4, 2, 1 such that the box in an image of 1/n still has `size` pixels."""
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    # Under 8 pixels, two reductions may give the same size, and libjpeg-turbo takes either.
    return next((n for n in SCALES if short >= n * size and size >= 8), 1)


def _resized(pixels: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The box of uint8 [h, w, 3], bicubic and antialiased, as uint8 [size, size, 3], read-only.

    Within 2 of Pillow's resize of the same pixels. The same on every processor; frees the GIL.
    """
    x, y = math.floor(box[0]), math.floor(box[1])
    window = pixels[y : math.ceil(box[3]), x : math.ceil(box[2])]
    source = ImageData(window.shape[1], window.shape[0], PixelType.U8x3, window.tobytes())
    resizer, target = _resizing(size)
    crop = (box[0] - x, box[1] - y, box[2] - box[0], box[3] - box[1])
    options = WHOLE
    if crop != (0, 0, source.width, source.height):
        options = ResizeOptions(BICUBIC, crop_box=CropBox(*crop))
    resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


def _resizing(size: int) -> tuple[Resizer, ImageData]:
    """This thread's resizer, which keeps its memory for the next image, and where it writes."""
    if getattr(_thread, "size", None) != size:
        _thread.resizer, _thread.size = Resizer(), size
        _thread.target = ImageData(size, size, PixelType.U8x3)
    return _thread.resizer, _thread.target


def _rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def eval_transform(
    data: bytes,
    size: int,
    resize: str = "shortest",
    interpolation: str = "bicubic",
    resize_size: int = 0,
    *,
    allow_truncated: bool = False,
) -> np.ndarray:
    """Resize and central crop: uint8 [size, size, 3], pixel for pixel open_clip's.

    Args:
      resize: "shortest" brings the short side to `resize_size`, "squash" both sides.
      interpolation: "bicubic" or "bilinear", both antialiased.
      resize_size: pixels, at least `size`; 0 stands for `size`.
      allow_truncated: as in decode.

    Raises:
      BadExample: as decode.
    """
    image = decode(data, allow_truncated)
    width, height = image.size
    side, short = resize_size or size, min(width, height)
    if resize == "squash":
        width, height = side, side
    elif short != side:
        # The long side is truncated, not rounded, as torchvision's Resize does.
        width, height = int(side * width / short), int(side * height / short)
    if image.size != (width, height):
        image = image.resize((width, height), FILTERS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _rgb(image.crop((left, top, left + size, top + size)))


def to_input(
    image_bhwc: jax.Array,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: int,
    dtype=np.float32,
) -> jax.Array:
    """uint8 [b, h, w, c] to normalised [b, size, size, c], on the device.

    Resized (cubic, antialiased) only where the size differs; all in float32, cast last.
    """
    import jax
    import jax.numpy as jnp

    b, h, w, c = image_bhwc.shape
    image_bhwc = image_bhwc.astype(jnp.float32) / 255.0
    if (h, w) != (size, size):
        image_bhwc = jax.image.resize(image_bhwc, (b, size, size, c), "cubic", antialias=True)
        # Cubic interpolation overshoots at edges; the pixels of an image file cannot.
        image_bhwc = jnp.clip(image_bhwc, 0.0, 1.0)
    mean_c, std_c = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return ((image_bhwc - mean_c[None, None, None]) / std_c[None, None, None]).astype(dtype)
