"""Encoded images to pixels on the host, refusing what would poison or kill a run.

Two ways lead to pixels. Pillow decodes every format, in the mode of the file. libjpeg-turbo
(through simplejpeg) decodes ordinary JPEGs for training, at a fraction of their size where that
suffices; its pixels at full size are Pillow's, bit for bit. Where libjpeg-turbo finds anything to
complain of, Pillow decides, so that training and evaluation accept the same files.

EXIF orientation is ignored, as in the CLIP teachers' evaluation (OpenAI CLIP, open_clip): the
pixels are used as they are stored. So is all other metadata, broken or not, and of an animation
only the first frame is used. Damage inside compressed data often decodes without any error; only
hashes of the files can find it.
"""

import io
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
    data: bytes, size: tuple[int, int], scale: int = 1, order: str = "RGB", strict: bool = True
) -> np.ndarray | None:
    """Decode a JPEG at 1/scale: uint8 [ceil(height / scale), ceil(width / scale), 3].

    Args:
      size: of the data, from jpeg_size.
      scale: 1, 2, 4 or 8; pixel k of the result covers pixels k * scale ... of the image.
      order: of the channels, "RGB" or "BGR".
      strict: None also where libjpeg-turbo could go on, as after an early end of the file.

    Returns:
      The pixels, or None where libjpeg-turbo complains.
    """
    width, height = size
    try:
        return simplejpeg.decode_jpeg(
            data, order, min_height=-(-height // scale), min_width=-(-width // scale), strict=strict
        )
    except ValueError:
        return None


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
