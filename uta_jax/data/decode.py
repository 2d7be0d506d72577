"""Encoded images to pixels on the host, refusing what would poison or kill a run.

Two ways lead to pixels. Pillow decodes every format, in the mode of the file. libjpeg-turbo
(through simplejpeg) decodes ordinary JPEGs for training, at a fraction of their size where that
suffices and no further down than the crop reaches; its pixels at full size are Pillow's, bit for
bit. Where libjpeg-turbo finds anything to complain of, Pillow decides, so that training and
evaluation accept the same files.

EXIF orientation is ignored, as in the CLIP teachers' evaluation (OpenAI CLIP, open_clip): the
pixels are used as they are stored. So is all other metadata, broken or not, and of an animation
only the first frame is used. Damage inside compressed data often decodes without any error; only
hashes of the files can find it.
"""

import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from uta_jax import UserError
from uta_jax.data import BadExample
from uta_jax.data.files import MAX_BYTES

MAX_PIXELS = 64_000_000  # refused from the header, before anything is allocated
MAX_ASPECT = 50  # a 2 x 4000 image would become 448000 x 224 when its short side is resized
# Other modes (16-bit, float) lose their values silently in convert("RGB").
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# Pillow knows many more; some of them start other programs (EPS) or are no pictures at all.
# Registered here, by import, so that a file of no known format makes Pillow import nothing.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
        Jpeg2KImagePlugin.Jpeg2KImageFile,
        AvifImagePlugin.AvifImageFile,
    )
)
SCALES = (8, 4, 2)  # 1/n: the sizes that libjpeg-turbo's fast inverse transforms produce
# Rows of the result beyond those asked for that upsampling of colour may look at: one of colour.
CONTEXT = 2
# Markers of a JPEG: frames (baseline, extended), a scan, and what changes nothing here (tables of
# Huffman codes and of quantisation, comments). Those of applications are E0 to EF.
_FRAMES, _SCAN, _TABLES = (0xC0, 0xC1), 0xDA, (0xC4, 0xDB, 0xFE)
# libjpeg-turbo's first complaint, where it met nothing before the end of a JPEG but unread data.
_ONLY_UNREAD = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")

# Pillow warns of broken metadata, which is ignored, and of sizes that are refused here anyway.
# For the whole process: catch_warnings, which would undo it, is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes, allow_truncated: bool = False) -> Image.Image:
    """Decode the first frame with Pillow, in the mode of the file.

    Args:
      allow_truncated: use a JPEG that ends early; what is missing of it is grey. Other formats
        are refused all the same.

    Raises:
      BadExample: not an image, truncated, too large, too thin, or a mode that RGB cannot hold.
      UserError: Pillow was told, by other code in this process, to accept truncated images.
    """
    _check_bytes(data)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which would fill up truncated images; set "
            "it to False (data.allow_truncated takes truncated JPEGs)"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(*image.size)
        image.load()
    except (BadExample, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limits are reached before ours can be.
        raise BadExample(f"image of more than {MAX_PIXELS} pixels ({error})") from None
    except UnidentifiedImageError:
        raise BadExample(f"not an image ({len(data)} bytes starting {data[:8]!r})") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        size = jpeg_size(data) if allow_truncated else None
        if size is None or (pixels := decode_jpeg(data, size, strict=False)) is None:
            raise BadExample(f"broken image ({error})") from None
        image = Image.fromarray(pixels)
    if image.mode not in MODES:
        raise BadExample(f"image mode {image.mode}: 8-bit images only; convert it to 8-bit RGB")
    image.info.pop("transparency", None)  # has no part in RGB; Pillow would warn of that
    return image


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header of a JPEG that decode_jpeg can take; None for other files.

    Those others are files that are no JPEG, broken headers, and colour models of four channels.

    Raises:
      BadExample: too large or too thin.
    """
    _check_bytes(data)
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(width, height)
    return (width, height) if colours in ("Gray", "YCbCr", "RGB") else None


def decode_jpeg(
    data: bytes,
    size: tuple[int, int],
    scale: int = 1,
    order: str = "RGB",
    strict: bool = True,
    bottom: int | None = None,
) -> np.ndarray | None:
    """Decode a JPEG at 1/scale: uint8 [ceil(height / scale), ceil(width / scale), 3].

    Args:
      size: of the data, from jpeg_size.
      scale: 1, 2, 4 or 8; pixel k of the result covers pixels k * scale ... of the image.
      order: of the channels, "RGB" or "BGR".
      strict: None also where libjpeg-turbo could go on, as after an early end of the file.
      bottom: rows of the image that are needed. The result may end below them (the rows that it
        has are the same), and of damage below them only an early end of the file is found.

    Returns:
      The pixels, or None where libjpeg-turbo complains.
    """
    width, height = size
    if strict and bottom is not None:
        # Under 8 rows, two scales may give the same size, and libjpeg-turbo takes either.
        rows = max(-(-bottom // scale) + CONTEXT, 8) * scale
        if rows < height and (short := _shortened(data, rows)):
            pixels = _first_rows(short, (width, rows), scale, order)
            if pixels is not None:
                return pixels
    try:
        return simplejpeg.decode_jpeg(
            data, order, min_height=-(-height // scale), min_width=-(-width // scale), strict=strict
        )
    except ValueError:
        return None


def _shortened(data: bytes, rows: int) -> bytearray | None:
    """The JPEG with `rows` as its height, at which decoders stop; None where that is no good.

    libjpeg-turbo complains of the unread rest, and then of nothing after it. So that this hides no
    damage to the rows, all of them must precede it: one sequential scan of all components. Nor must
    the rest contain restart markers, or an early end of the file would be hidden.
    """
    at, frame, components = 2, 0, 0
    while data[at] == 0xFF and (marker := data[at + 1]) != _SCAN:
        if marker in _FRAMES:  # length (2 bytes), precision, height (2), width (2), components
            frame, components = at, data[at + 9]
        elif not (marker in _TABLES or 0xE0 <= marker <= 0xEF):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not frame or data[at] != 0xFF or data[at + 4] != components:
        return None
    short = bytearray(data)
    short[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    return short


def _first_rows(
    short: bytearray, size: tuple[int, int], scale: int, order: str
) -> np.ndarray | None:
    """decode_jpeg of what _shortened returns."""
    width, rows = size
    pixels = np.empty((rows // scale, -(-width // scale), 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            short, order, min_height=len(pixels), min_width=pixels.shape[1], buffer=pixels
        )
    except ValueError as error:
        return pixels if _ONLY_UNREAD.fullmatch(str(error)) else None
    return pixels


def _check_bytes(data: bytes) -> None:
    if not data:
        raise BadExample("empty file (0 bytes)")
    if len(data) > MAX_BYTES:
        raise BadExample(f"file of {len(data)} bytes: at most {MAX_BYTES} are decoded")


def check_size(width: int, height: int) -> None:
    """Raise BadExample for an image too large or too thin."""
    if width * height > MAX_PIXELS:
        raise BadExample(f"image of {width}x{height} pixels: at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadExample(
            f"image of {width}x{height} pixels: over {MAX_ASPECT} times longer than wide"
        )
