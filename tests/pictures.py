"""A source of little pictures in memory that worker processes can import quickly."""

import io

import numpy as np
from PIL import Image

from uta_jax.data import BadExample


class Pictures:
    """n pictures of random pixels; those of `bad` are no pictures, those of `lost` unreadable."""

    class_names = ("even", "odd")

    def __init__(self, n, bad=(), lost=(), text=True, side=12, read=None):
        self.n, self.bad, self.lost, self.text, self.side = n, bad, lost, text, side
        self.read = read  # a list to note what was read, in this process
        self.fields = ("image", "key", "label", *(("text",) if text else ()))

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if self.read is not None:
            self.read.append(int(index))
        if index in self.lost:
            raise BadExample("cannot be read")
        example = {"image": self.image(index), "key": f"pic-{index}", "label": index % 2}
        return example | ({"text": f"picture {index}"} if self.text else {})

    def image(self, index):
        if index in self.bad:
            return b"GIF89a"
        shape = (self.side, self.side, 3)
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def fingerprint(self):
        return f"pictures{self.n}"

    def describe(self):
        return {"kind": "pictures", "examples": self.n}

    def problems(self):
        return iter(())
