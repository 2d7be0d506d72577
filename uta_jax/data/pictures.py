"""Made-up photographs on disk, to measure with. Worker processes import this without JAX."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# About ImageNet's bytes per pixel, on which decoding depends.
WRITTEN, WIDTH, HEIGHT, QUALITY = 64, 500, 375, 94


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A made-up RGB image that costs a decoder about what a photograph does.

    Smoothed noise with the same energy in every octave, as photographs have (Field 1987, the
    power spectrum falls with the square of the frequency), and some shapes with sharp edges.
    """
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        rows, columns = 2**octave * height // width + 2, 2**octave + 2
        grey = rng.normal(size=(rows, columns, 1))
        coarse = (grey + 0.4 * rng.normal(size=(rows, columns, 3))).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel])
            total[..., channel] += plane.resize((width, height), Image.Resampling.BICUBIC)
    image = Image.fromarray(np.clip(total / total.std() * 50 + 120, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(12):
        x, y, side = (int(rng.integers(n)) for n in (width, height, width // 5))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + side, y + side), fill=(*rng.integers(0, 256, 3).tolist(), 140))
    return image


class Pictures:
    """A source of JPEGs drawn by `picture` and written into a directory.

    With `repeats` every file counts as so many examples: to shuffle a few dozen of them costs as
    much, an example, as to decode it, and a few thousand next to nothing.
    """

    class_names: tuple[str, ...] = ()
    fields = ("image", "key")

    def __init__(self, path: Path, count: int = WRITTEN, repeats: int = 1):
        self._repeats = repeats
        self._paths = [path / f"{n:05d}.jpg" for n in range(count)]
        for n, file in enumerate(self._paths):
            image = picture(np.random.default_rng(n), WIDTH, HEIGHT)
            image.save(file, "JPEG", quality=QUALITY)

    def __len__(self) -> int:
        return len(self._paths) * self._repeats

    def __getitem__(self, index: int) -> dict:
        path = self._paths[index % len(self._paths)]
        return {"image": path.read_bytes(), "key": path.name}

    def fingerprint(self) -> str:
        """Of the bytes of all files."""
        return hashlib.sha256(b"".join(p.read_bytes() for p in self._paths)).hexdigest()[:32]

    def describe(self) -> dict[str, str | int]:
        """Kind, path and count, as of every source."""
        return {
            "kind": "pictures",
            "path": str(self._paths[0].parent),
            "examples": len(self),
        }

    def problems(self) -> Iterator[str]:
        """None: they were just written."""
        return iter(())
