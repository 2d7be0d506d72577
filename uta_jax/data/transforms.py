"""Encoded bytes to pixels on the host, and uint8 pixels to network input on the device.

Order of operations follows the CLIP teachers (OpenAI CLIP, open_clip, UTA): resize or crop in the
image's own mode, then convert to RGB. EXIF orientation is ignored, as there.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from uta_jax import UserError

MAX_PIXELS = 64_000_000  # refused from the header, before anything is allocated
MAX_ASPECT = 50  # a 2 x 4000 image would become 448000 x 224 when its short side is resized
# Other modes (16-bit, float) lose their values silently in convert("RGB").
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes) -> Image.Image:
    """Decode the first frame, in the mode of the file.

    Raises:
      UserError: not an image, truncated, too large, too thin, or a mode that RGB cannot hold.
    """
    if not data:
        raise UserError("empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        _check_size(*image.size)
        image.load()
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, where ours was not reached
        raise UserError(
            f"image of far more than the {MAX_PIXELS} pixels that are decoded"
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"not an image ({len(data)} bytes starting {data[:8]!r})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise UserError(f"broken image ({error})") from None
    if image.mode not in MODES:
        raise UserError(f"image mode {image.mode}: 8-bit images only; convert it to 8-bit RGB")
    image.info.pop("transparency", None)  # has no part in RGB; Pillow would warn of that
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"image of {width}x{height} pixels: at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"image of {width}x{height} pixels: over {MAX_ASPECT} times longer than wide"
        )


def _rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def sample_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) as in Inception (Szegedy et al. 2015, section 6).

    Its share of the area is uniform in `scale`, the logarithm of its width / height uniform in log
    `ratio`. After 10 boxes that stick out, the largest central box whose shape lies within `ratio`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_transform(
    data: bytes,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> np.ndarray:
    """Random resized crop (bicubic) and horizontal flip: uint8 [size, size, 3].

    Always draws from rng in the same order, so the result depends on (data, rng state) alone.

    Raises:
      UserError: as decode.
    """
    image = decode(data)
    flipped = flip and rng.random() < 0.5
    box = sample_crop(rng, *image.size, scale, ratio)
    pixels = _rgb(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flipped else pixels


def eval_transform(
    data: bytes,
    size: int,
    resize: str = "shortest",
    interpolation: str = "bicubic",
    resize_size: int = 0,
) -> np.ndarray:
    """Resize and central crop: uint8 [size, size, 3], pixel for pixel open_clip's.

    Args:
      resize: "shortest" brings the short side to `resize_size`, "squash" both sides.
      interpolation: "bicubic" or "bilinear", both antialiased.
      resize_size: pixels, at least `size`; 0 stands for `size`.

    Raises:
      UserError: as decode.
    """
    image = decode(data)
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
    dtype=jnp.float32,
) -> jax.Array:
    """uint8 [b, h, w, c] to normalised [b, size, size, c], on the device.

    Resized (cubic, antialiased) only where the size differs; all in float32, cast last.
    """
    b, h, w, c = image_bhwc.shape
    image_bhwc = image_bhwc.astype(jnp.float32) / 255.0
    if (h, w) != (size, size):
        image_bhwc = jax.image.resize(image_bhwc, (b, size, size, c), "cubic", antialias=True)
        # Cubic interpolation overshoots at edges; the pixels of an image file cannot.
        image_bhwc = jnp.clip(image_bhwc, 0.0, 1.0)
    mean_c, std_c = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return ((image_bhwc - mean_c[None, None, None]) / std_c[None, None, None]).astype(dtype)
