"""Broken, odd and hostile images: what each of them does to a plain Pillow pipeline, and to ours.

Every test first shows that the fault is real. That bad examples are skipped, counted and replaced
is the loader's part.
"""

import io
import json
import re
import struct
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from uta_jax import UserError
from uta_jax.data import BadExample
from uta_jax.data.decode import MAX_BYTES, decode, jpeg_size
from uta_jax.data.transforms import eval_transform, to_input, train_transform


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    """Coarse noise: JPEG keeps it nearly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def png(width, height, bits, colours, rows=b""):
    """A PNG of that header, with `rows` (filter byte and samples) as its pixels."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def jpeg_with(segment):
    """JPEG with one more APP1 segment behind its start."""
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + JPEG[2:]


JPEG = encode(noise(64, 48), "JPEG", quality=90)
BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\xff\xff\xff\xff\0\6\0\0"
BROKEN_XMP = b"http://ns.adobe.com/xap/1.0/\0<x\xff\xfe\x80"


def pillow(data):
    """Pixels of a plain Pillow pipeline."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def whole(data, size, **options):
    """The training transform with a box that is the whole of a square image."""
    rng = np.random.default_rng(0)
    return train_transform(data, rng, size, (1, 1), (1, 1), flip=False, **options)


def transforms(size, **options):
    return (
        lambda data: whole(data, size, **options),
        lambda data: eval_transform(data, size, **options),
    )


def assert_refused(data, reason, **options):
    for transform in (*transforms(16, **options), lambda d: decode(d, **options)):
        with pytest.raises(BadExample, match=reason) as refused:
            transform(data)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"<html>\n<title>404 Not Found</title></html>", "not an image"),
        (JPEG[:20], "not an image"),
    ],
    ids=["1 empty", "2 html", "3 header"],
)
def test_no_image_at_all(data, reason):
    with pytest.raises(UnidentifiedImageError):
        pillow(data)
    assert_refused(data, reason)


@pytest.mark.parametrize("half", [True, False], ids=["4 half", "5 two bytes"])
def test_truncated_jpegs_are_refused_unless_allowed(half):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    complete = encode(Image.fromarray(pixels), "JPEG")
    data = complete[: len(complete) // 2 if half else -2]
    with pytest.raises(OSError, match="truncated"):
        pillow(data)
    assert_refused(data, "broken image.*truncated")
    kept = np.asarray(decode(data, allow_truncated=True))
    assert np.array_equal(kept[:30], pillow(complete)[:30])  # two rows of blocks at least
    assert np.array_equal(kept, pillow(complete)) == (not half)
    for transform in transforms(16, allow_truncated=True):
        assert transform(data).shape == (16, 16, 3)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert_refused(data, "broken image.*truncated")  # allowing it once changes nothing later


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_4_other_truncated_formats_are_refused_even_if_truncated_jpegs_are_allowed(kind):
    data = encode(noise(64, 48), kind)[:-200]
    assert_refused(data, "broken image|not an image", allow_truncated=True)


def test_6_a_flipped_byte_mostly_decodes_without_a_word():
    """Documented in decode.py: only hashes of files find it."""
    silent = 0
    for at in range(len(JPEG) - 200, len(JPEG) - 2, 20):
        data = JPEG[:at] + bytes([JPEG[at] ^ 4]) + JPEG[at + 1 :]
        try:
            damaged = pillow(data)
        except OSError:
            continue
        silent += not np.array_equal(damaged, pillow(JPEG))
        for transform in transforms(16):  # both accept what Pillow accepts
            assert transform(data).shape == (16, 16, 3)
    assert silent > 3


def test_4_a_process_in_which_pillow_fills_up_truncated_images_is_refused(monkeypatch):
    """Other code sets the flag for all; which images are bad would depend on who imported it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(noise(32, 32))
    assert pillow(data[: len(data) // 2]).shape == (32, 32, 3)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES is set") as error:
        decode(data)
    assert not isinstance(error.value, BadExample)


def test_7_trailing_garbage_is_ignored():
    for ours, clean in zip(transforms(16), transforms(16), strict=True):
        assert np.array_equal(ours(JPEG + b"garbage" * 9), clean(JPEG))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_8_the_content_counts_not_the_name(kind, tmp_path):
    file = tmp_path / "picture.jpg"
    file.write_bytes(encode(noise(32, 32), kind))
    assert not file.read_bytes().startswith(b"\xff\xd8")
    for transform in transforms(32):
        assert np.array_equal(transform(file.read_bytes()), pillow(file.read_bytes()))


# (mode, format, colour in that mode) -> RGB. JPEGs keep these colours within what is told.
GOLDEN = {
    "9 CMYK JPEG": ("CMYK", "JPEG", (10, 20, 30, 40), (207, 198, 190)),
    "9 CMYK TIFF": ("CMYK", "TIFF", (0, 255, 255, 0), (255, 0, 0)),
    "10 grey JPEG": ("L", "JPEG", 77, (77, 77, 77)),
    "10 grey PNG": ("L", "PNG", 77, (77, 77, 77)),
    "10 bilevel": ("1", "PNG", 1, (255, 255, 255)),
    "11 grey and alpha: alpha is dropped": ("LA", "PNG", (77, 10), (77, 77, 77)),
    "12 alpha is dropped": ("RGBA", "PNG", (10, 200, 30, 40), (10, 200, 30)),
    "12 transparent": ("RGBA", "PNG", (10, 200, 30, 0), (10, 200, 30)),
    "13 palette": ("P", "PNG", 3, (9, 10, 11)),
    "YCbCr": ("YCbCr", "TIFF", (100, 110, 150), (130, 90, 68)),
    "RGB JPEG": ("RGB", "JPEG", (90, 90, 90), (90, 90, 90)),
    "RGB": ("RGB", "PNG", (1, 2, 3), (1, 2, 3)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_9_to_13_golden_pixels_per_mode(name):
    mode, kind, colour, rgb = GOLDEN[name]
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette(list(range(30)))
    data = encode(image, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    for transform in transforms(16):
        pixels = transform(data)
        assert pixels.dtype == np.uint8 and (pixels == np.uint8(rgb)).all()


def test_13_palette_with_transparency_gives_the_palette_colours():
    image = Image.new("P", (16, 16), 3)
    image.putpalette(list(range(30)))
    for transform in transforms(16):
        assert (transform(encode(image, transparency=3)) == np.uint8((9, 10, 11))).all()


def test_14_a_16_bit_grey_png_is_refused_and_colour_is_scaled():
    grey = encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)))
    assert (pillow(grey) == 255).all()  # 40000 of 65535 would be 156
    assert_refused(grey, "mode I;16: 8-bit images only")
    row = b"\0" + struct.pack(">3H", 0x8040, 0x10FF, 0xFFFF) * 16
    colour = png(16, 16, 16, 2, row * 16)
    for transform in transforms(16):
        assert (transform(colour) == np.uint8((0x80, 0x10, 0xFF))).all()


def test_15_a_float_tiff_is_refused():
    data = encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")
    assert (pillow(data) == 0).all()
    assert_refused(data, "mode F: 8-bit")


def test_15_an_integer_tiff_is_refused():
    data = encode(Image.new("I", (8, 8), 70_000), "TIFF")
    assert (pillow(data) == 255).all()
    assert_refused(data, "mode I: 8-bit")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_16_of_an_animation_the_first_frame_is_used(kind):
    frames = [noise(32, 32, seed) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    animation = Image.open(io.BytesIO(data))
    assert animation.n_frames == 3
    first = np.asarray(animation.convert("RGB"))
    animation.seek(1)
    assert not np.array_equal(np.asarray(animation.convert("RGB")), first)
    for transform in transforms(32):
        assert np.array_equal(transform(data), first)


def test_17_exif_orientation_is_ignored_in_training_and_evaluation():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = encode(noise(64, 64), "JPEG", exif=exif)
    stored = pillow(turned)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
    assert not np.array_equal(stored, upright)
    for transform in transforms(64):
        assert np.array_equal(transform(turned), stored)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger")
def test_18_broken_metadata_is_ignored():
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        Image.open(io.BytesIO(jpeg_with(BROKEN_EXIF)))
    with pytest.raises(UnicodeDecodeError):
        Image.open(io.BytesIO(jpeg_with(BROKEN_XMP))).info["xmp"].decode()
    for data in map(jpeg_with, (BROKEN_EXIF, BROKEN_XMP)):
        for ours, clean in zip(transforms(16), transforms(16), strict=True):
            assert np.array_equal(ours(data), clean(JPEG))


LIMITED = """
import io, json, resource, sys
import numpy
from PIL import Image
from uta_jax.data import BadExample
from uta_jax.data.transforms import eval_transform, train_transform
files = [bytes.fromhex(line) for line in sys.stdin]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
def outcome(function, *args):
    try:
        return str(function(*args).shape)
    except (BadExample, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
def plain(data, size):
    Image.MAX_IMAGE_PIXELS = None
    try:
        width, height = Image.open(io.BytesIO(data)).size
        scale = size / min(width, height)
        resized = Image.open(io.BytesIO(data)).resize((int(width * scale), int(height * scale)))
        return numpy.asarray(resized)
    finally:
        Image.MAX_IMAGE_PIXELS = 1024 * 1024 * 1024 // 4 // 3
def train(data, size):
    return train_transform(data, numpy.random.default_rng(0), size)
print(json.dumps([[outcome(f, d, 224) for f in (plain, train, eval_transform)] for d in files]))
"""


def test_18_to_21_headers_are_checked_before_anything_is_allocated():
    """In a process of 64 MiB beyond its start, in which every warning is an error."""
    start = JPEG.index(b"\xff\xc0") + 5
    claims = JPEG[:start] + struct.pack(">HH", 60_000, 60_000) + JPEG[start + 4 :]
    files = {
        "19 png": png(60_000, 60_000, 8, 2),
        "19 jpeg": claims,
        "20": png(12_000, 12_000, 1, 0, bytes(1501) * 12_000),
        "21": encode(Image.new("1", (2, 4000))),
        "18": jpeg_with(BROKEN_EXIF),
    }
    assert Image.open(io.BytesIO(files["21"])).size == (2, 4000) and len(files["21"]) < 200
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED],
        input="\n".join(data.hex() for data in files.values()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = dict(zip(files, json.loads(done.stdout), strict=True))
    assert results.pop("18")[1:] == ["(224, 224, 3)"] * 2
    reasons = {
        "19 png": "more than 64000000 pixels",
        "19 jpeg": "(60000x60000|more than 64000000) pixels",
        "20": "(12000x12000|more than 64000000) pixels",
        "21": "2x4000 pixels: over 50 times",
    }
    for name, (plain, *ours) in results.items():
        assert plain.startswith("MemoryError"), (name, plain)
        for outcome in ours:
            assert re.search(f"^BadExample: .*{reasons[name]}", outcome), (name, outcome)


def test_19_a_jpeg_is_refused_from_its_header_alone():
    start = JPEG.index(b"\xff\xc0") + 5
    for size, reason in (((9000, 8000), "8000x9000 pixels"), ((5000, 50), "50x5000 pixels: over")):
        with pytest.raises(BadExample, match=reason):
            jpeg_size(JPEG[:start] + struct.pack(">HH", *size) + JPEG[start + 4 :])


def test_files_of_too_many_bytes_are_refused():
    data = JPEG + bytes(MAX_BYTES)
    assert pillow(data).shape == (48, 64, 3)  # nothing else is wrong with it
    assert_refused(data, f"at most {MAX_BYTES} are decoded")


def test_a_file_that_would_start_a_program_is_no_image():
    """Pillow hands PostScript, whatever the file's name, to Ghostscript."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    assert_refused(data, "not an image")


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (1, 1), (9, 8, 7)), Image.new("RGB", (40, 30))],
    ids=["22 one pixel", "23 black"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_22_and_23_flat_images_train_without_nan(image, kind):
    data = encode(image, kind)
    colour = pillow(data)[0, 0]
    for transform in (lambda d: train_transform(d, np.random.default_rng(0), 16), *transforms(16)):
        pixels = transform(data)
        assert pixels.shape == (16, 16, 3) and (pixels == colour).all()
        network = to_input(jnp.asarray(pixels)[None], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 24)
        assert network.shape == (1, 24, 24, 3) and bool(jnp.isfinite(network).all())
