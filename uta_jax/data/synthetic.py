"""Made-up images: a training that reads nothing, to tell slow data from a slow step."""

import functools
import io
import os
import re
from collections.abc import Iterator

import numpy as np

from uta_jax import UserError
from uta_jax.data import BadExample
from uta_jax.data.decode import check_size
from uta_jax.data.files import checked_index, digest

_DEFAULT = "256x256:100000"
_POOL = 64  # different images; the examples take them in turn
_CLASSES = 10
_CELLS = (
    16  # the images are soft noise of so many cells, about as large as photographs when encoded
)


class SyntheticSource:
    """JPEG images of one size with made-up captions and labels, the same ones every time.

    There are 64 different images, encoded when the first is asked for; example i is image i mod 64.
    """

    fields = ("image", "key", "text", "label")
    class_names = tuple(f"class {n}" for n in range(_CLASSES))

    def __init__(self, path: str | os.PathLike = "", split: str = ""):
        """path: "WIDTHxHEIGHT:EXAMPLES", by default 256x256:100000; each split has other images.

        Raises:
          UserError: another path, or images that would not be decoded.
        """
        pattern = r"([1-9]\d{0,3})x([1-9]\d{0,3}):([1-9]\d{0,9})"
        found = re.fullmatch(pattern, os.fspath(path) or _DEFAULT)
        if not found:
            raise UserError(
                f"data.path={path}: must be WIDTHxHEIGHT:EXAMPLES for synthetic data: {_DEFAULT}"
            )
        self._width, self._height, self._length = map(int, found.groups())
        self._split = split
        try:
            check_size(self._width, self._height)
        except BadExample as error:
            raise UserError(f"data.path={path}: {error}") from None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        index = checked_index(index, len(self))
        label = index % _POOL % _CLASSES
        image = _image(self._split, index % _POOL, self._width, self._height)
        text = f"a made-up picture of {self.class_names[label]}"
        return {"image": image, "key": f"synthetic-{index:010d}", "text": text, "label": label}

    def fingerprint(self) -> str:
        """Of the split, the size and the number of the images."""
        return digest("synthetic", self._split, self._width, self._height, self._length)

    def describe(self) -> dict[str, str | int]:
        """What a change of the data is shown with."""
        path = f"{self._width}x{self._height}:{self._length}"
        return {"kind": "synthetic", "path": path, "split": self._split, "examples": self._length}

    def problems(self) -> Iterator[str]:
        """None: nothing is read."""
        return iter(())


@functools.lru_cache(maxsize=4 * _POOL)
def _image(split: str, number: int, width: int, height: int) -> bytes:
    from PIL import Image

    rng = np.random.default_rng([number, *split.encode()])
    cells = rng.integers(0, 256, (_CELLS, _CELLS, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 9, (height, width, 1))
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
