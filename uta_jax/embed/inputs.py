"""What ``embed`` reads: pictures, arrays, indices, lines of text; all checked in one line each."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from uta_jax import UserError
from uta_jax.data.sources import Source, open_source
from uta_jax.data.transforms import eval_transform
from uta_jax.models.presets import ClipSpec


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, empty ones among them; a last newline ends the last line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--texts={path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--texts={path}: not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"--texts={path}: holds no text; write one a line")
    # Universal newlines were applied; other separators of str.splitlines belong to a text.
    return text.removesuffix("\n").split("\n")


def load_npy(path: Path) -> np.ndarray:
    """The one array of an .npy file, mapped, never unpickled."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # whatever a header that is no header ends in
        raise UserError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: holds several arrays; give an .npy of one")
    return array


def open_array(path: Path) -> np.ndarray:
    """Floats [n, h, w, 3] of an .npy, whichever axis of it had the colours."""
    array = load_npy(path)
    where = f"--images={path}: {array.dtype} {list(array.shape)}"
    if array.ndim != 4 or array.dtype.kind != "f" or 0 in array.shape:
        raise UserError(f"{where} must be normalised floats [n, 3, s, s] or [n, s, s, 3]")
    first, last = array.shape[1] == 3, array.shape[3] == 3
    if first == last:
        reason = "both axis 1 and axis 3 are" if first else "neither axis 1 nor axis 3 is"
        raise UserError(f"{where}: {reason} 3 long, so the colours cannot be told")
    return array.transpose(0, 2, 3, 1) if first else array


def open_images(path: Path) -> Source | np.ndarray:
    """The pictures in a folder or in a tar, or the array in an .npy."""
    if path.is_dir():
        return open_source("folder", path, "")
    if path.suffix == ".npy":
        return open_array(path)
    if path.suffix != ".tar":
        raise UserError(f"--images={path}: give a folder, a .tar or an .npy")
    if not path.is_file():
        raise UserError(f"--images={path}: no such file")
    return open_source("tar", path, "")


def batches_for(found: Source | np.ndarray, spec: ClipSpec, path: str | Path):
    """What ``open_images`` found, by ranges of rows, as the model of ``spec`` takes it."""
    if isinstance(found, np.ndarray):
        return ArrayBatches(found, spec, path)
    return PictureBatches(found, spec)


class PictureBatches:
    """Rows of a source as (keys, uint8 [b, s, s, 3]), prepared as the model was trained to see."""

    def __init__(self, source: Source, spec: ClipSpec):
        self._source = source
        self._prepare = partial(
            eval_transform,
            size=spec.vision.image_size,
            resize=spec.resize,
            interpolation=spec.interpolation,
            resize_size=spec.resize_size,
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, rows: range) -> tuple[list[str], np.ndarray]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._one, rows))
        return [key for key, _ in found], np.stack([pixels for _, pixels in found])

    def _one(self, index: int) -> tuple[str, np.ndarray]:
        example = self._source[index]
        try:
            return example["key"], self._prepare(example["image"])
        except UserError as error:
            raise UserError(f"image {example['key']!r}: {error}") from None


class ArrayBatches:
    """Rows of normalised floats as (row numbers as text, float32 [b, s, s, 3])."""

    def __init__(self, image_nhwc: np.ndarray, spec: ClipSpec, path: str | Path):
        side = spec.vision.image_size
        if image_nhwc.shape[1:3] != (side, side):
            h, w = image_nhwc.shape[1:3]
            raise UserError(f"--images={path}: {h} x {w} pixels, the model takes {side} x {side}")
        self._image_nhwc, self._path = image_nhwc, path

    def __len__(self) -> int:
        return len(self._image_nhwc)

    def __getitem__(self, rows: range) -> tuple[list[str], np.ndarray]:
        image_bhwc = np.ascontiguousarray(self._image_nhwc[rows.start : rows.stop], np.float32)
        broken = ~np.isfinite(image_bhwc).all(axis=(1, 2, 3))
        if broken.any():
            row = rows[int(broken.argmax())]
            raise UserError(f"--images={self._path}: NaN or infinity in row {row}")
        return [str(row) for row in rows], image_bhwc


def check_keep(keep_nk: np.ndarray | None, path: str | Path, n: int, spec: ClipSpec) -> None:
    """Raise UserError where ``keep_nk`` are not patches of ``n`` images, each at most once."""
    if keep_nk is None:
        return
    where = f"--keep={path}: {keep_nk.dtype} {list(keep_nk.shape)}"
    if keep_nk.ndim != 2 or keep_nk.dtype.kind not in "iu" or not keep_nk.size:
        raise UserError(f"{where} must be integers [n, k]")
    if len(keep_nk) != n:
        raise UserError(f"{where} must have a row for each of the {n} images")
    outside = ((keep_nk < 0) | (keep_nk >= spec.vision.tokens)).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise UserError(f"{where}: row {row} leaves the patches 0 to {spec.vision.tokens - 1}")
    twice = (np.diff(np.sort(keep_nk, axis=1)) == 0).any(axis=1)
    if twice.any():
        raise UserError(f"{where}: row {int(twice.argmax())} names a patch twice")
