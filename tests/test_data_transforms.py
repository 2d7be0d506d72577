"""Crops, decoding at a fraction of the size, device input: what they promise. Faults: faults/."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import cykooz_resizer
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from uta_jax import UserError
from uta_jax.data import BadExample, bench, transforms
from uta_jax.data.decode import CONTEXT, SCALES, decode_jpeg, jpeg_size
from uta_jax.data.pictures import Pictures, picture
from uta_jax.data.transforms import jpeg_scale, sample_crop, to_input, train_transform


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photo():
    """JPEG bytes of 500x375 with the statistics of a photograph."""
    return encode(picture(np.random.default_rng(0), 500, 375), "JPEG", quality=90)


def test_train_transform_depends_on_bytes_and_rng_alone():
    data = encode(noise(50, 40))
    first = train_transform(data, np.random.default_rng(5), 16)
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, train_transform(data, np.random.default_rng(5), 16))
    assert not np.array_equal(first, train_transform(data, np.random.default_rng(6), 16))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [14, 15, 16, 30])  # rows of 42, 45, 48, 90 bytes
def test_a_flipped_crop_is_the_mirrored_crop(kind, size, monkeypatch):
    data, seeds = encode(noise(90, 70), kind), range(8)
    crops = [train_transform(data, np.random.default_rng(s), size) for s in seeds]
    # The same draws, with every flip undone before and done after.
    monkeypatch.setattr(transforms, "_backwards", lambda pixels: pixels[..., ::-1])
    rows = [crop[:, ::-1] if np.random.default_rng(s).random() < 0.5 else crop for s, crop in
            zip(seeds, crops, strict=True)]  # fmt: skip
    if kind == "JPEG":
        straight = [train_transform(data, np.random.default_rng(s), size) for s in seeds]
        assert all(map(np.array_equal, rows, straight))
    mirrored = [not np.array_equal(a, b) for a, b in zip(rows, crops, strict=True)]
    assert 0 < sum(mirrored) < len(seeds)


def test_threads_and_processor_extensions_do_not_change_a_pixel(photo, monkeypatch):
    def crop(seed):
        return train_transform(photo, np.random.default_rng(seed), 64).tobytes()

    alone = [crop(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(crop, range(24))) == alone

    class Plain(cykooz_resizer.Resizer):
        def __init__(self):
            super().__init__()
            self.cpu_extensions = cykooz_resizer.CpuExtensions.none

    monkeypatch.setattr(transforms, "Resizer", Plain)
    assert [crop(seed) for seed in range(24)] == alone


def test_the_box_is_decided_from_the_header(photo, monkeypatch):
    """At the smallest fraction of the size that holds as many pixels as are asked for."""
    seen = []

    def spy(data, size, scale, *args, **options):
        seen.append((size, scale))
        return decode_jpeg(data, size, scale, *args, **options)

    monkeypatch.setattr(transforms, "decode_jpeg", spy)
    for size in (224, 112, 90, 46, 20, 4):
        train_transform(photo, np.random.default_rng(0), size, (1, 1), (4 / 3, 4 / 3))
    assert seen == [((500, 375), scale) for scale in (1, 2, 4, 8, 8, 1)]


def test_jpeg_scale_keeps_the_asked_pixels():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, width, height = (int(n) for n in rng.integers(1, 900, 4))
        size = int(rng.integers(8, 300))
        scale = jpeg_scale((left, top, left + width, top + height), size)
        assert scale == 1 or min(width, height) / scale >= size
        assert scale == SCALES[0] or min(width, height) / (2 * scale) < size


@pytest.mark.parametrize("scale", SCALES)
def test_jpegs_decode_at_exactly_the_asked_fraction(scale):
    """Otherwise the box would be somewhere else in the picture."""
    rng = np.random.default_rng(scale)
    for _ in range(20):
        width, height = (int(n) for n in rng.integers(8 * scale, 400, 2))
        data = encode(Image.new("RGB", (width, height)), "JPEG")
        assert jpeg_size(data) == (width, height)
        pixels = decode_jpeg(data, (width, height), scale)
        assert pixels.shape == (-(-height // scale), -(-width // scale), 3)


@pytest.mark.parametrize("scale", (1, *SCALES))
@pytest.mark.parametrize("colours", ["444", "422", "420", "440", "411", "Gray"])
def test_decoding_down_to_a_row_changes_nothing_above_it(colours, scale):
    width, height = 101, 183
    pixels = np.asarray(noise(width, height))
    if colours == "Gray":
        data = simplejpeg.encode_jpeg(pixels[..., :1].copy(), colorspace="GRAY")
    else:
        data = simplejpeg.encode_jpeg(pixels, colorsubsampling=colours)
    whole, lengths = decode_jpeg(data, (width, height), scale), set()
    for bottom in range(1, height + 1):
        rows, needed = decode_jpeg(data, (width, height), scale, bottom=bottom), -(-bottom // scale)
        assert len(rows) >= needed and np.array_equal(rows[:needed], whole[:needed])
        lengths.add(len(rows))
    assert min(lengths) == max(8, 1 + CONTEXT) and max(lengths) == len(whole)


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}])
def test_jpegs_whose_rest_could_hide_damage_are_decoded_whole(options):
    data = encode(noise(64, 96), "JPEG", **options)
    pixels = decode_jpeg(data, (64, 96), bottom=9)
    assert np.array_equal(pixels, decode_jpeg(data, (64, 96)))


def test_a_jpeg_that_ends_early_is_found_wherever_the_crop_ends(photo):
    for end in (len(photo) - 2, len(photo) - 1, len(photo) // 2, len(photo) // 10):
        assert all(decode_jpeg(photo[:end], (500, 375), bottom=b) is None for b in (9, 180, 375))
    assert len(decode_jpeg(photo + b"after the end", (500, 375), bottom=180)) == 180 + CONTEXT


def test_flipped_bytes_give_the_pixels_of_the_whole_image_or_none():
    size, rng = (48, 96), np.random.default_rng(0)
    clean, outcomes = encode(noise(*size), "JPEG", quality=60), set()
    for _ in range(1500):
        data = bytearray(clean)
        header = rng.random() < 0.5
        data[int(rng.integers(2, 640 if header else len(data)))] = int(rng.integers(256))
        data = bytes(data)
        if not (found := _size_or_none(data)):
            continue
        rows = decode_jpeg(data, found, bottom=40)
        # What is found amiss below the rows asked for makes no difference to them.
        whole = decode_jpeg(data, found, strict=rows is None)
        outcomes.add((rows is None, whole is None))
        assert rows is None or np.array_equal(rows[:40], whole[:40])
    assert outcomes == {(False, False), (True, True)}


def _size_or_none(data: bytes) -> tuple[int, int] | None:
    try:
        return jpeg_size(data)
    except BadExample:
        return None


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


def test_bench_measures_every_step_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(bench, "BATCH", 8)
    monkeypatch.setattr(bench, "_torchvision", lambda: False)  # starts slowly
    loaders = bench._loaders  # worker processes start slowly too
    monkeypatch.setattr(bench, "_loaders", lambda *a: {"loader": loaders(*a)["loader"]})
    source = Pictures(tmp_path, bench.BATCH)
    result = bench.bench(source, 32, seconds=0.05, json_file=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    steps = {bench.DECODE, bench.CROP, bench.NORMALISE, "loader"}
    assert set(result["images_per_s"]) == steps
    assert all(rate > 1 for rate in result["images_per_s"].values())
    assert "of bare decoding" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 examples; at least 8"):
        bench.bench(Pictures(tmp_path, 3))


def test_bench_normalises_as_the_device_does():
    pixels = np.asarray(noise(12, 8))[None]
    device = to_input(pixels[:, :, :8], bench.MEAN, bench.STD, 8)
    np.testing.assert_allclose(bench.normalised(pixels)[:, :, :8], device, atol=1e-5)
