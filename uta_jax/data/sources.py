"""Where examples come from: random access by index, images still encoded.

A source has ``__len__``, ``__getitem__(i) -> dict``, ``fingerprint() -> str`` and ``class_names``.
An example holds ``image`` (encoded bytes) and ``key`` (str), and where known ``text`` (str),
``label`` (int) and ``mask`` (PNG bytes: 0 background, class c stored as c + 1).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

from uta_jax import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Source(Protocol):
    """Examples by index; the fingerprint changes when the examples behind them change."""

    class_names: tuple[str, ...]  # empty when unlabelled

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...
    def fingerprint(self) -> str: ...


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class TfdsSource:
    """A split of a prepared TFDS dataset in array_record format.

    Its features image, text, label, mask and key are used, the first one is required. Reads without
    TensorFlow. Images stay encoded: the loader decodes them where it also crops.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        """Open `split` ("train", "train[:10%]" ...) of the dataset directory `path`.

        Raises:
          UserError: no dataset there, no such split, an empty one, or no image feature.
        """
        import tensorflow_datasets as tfds
        from etils import epath  # as TFDS does, so that gs:// paths work

        if not (epath.Path(path) / "dataset_info.json").exists():
            raise UserError(f"data.path={path}: no TFDS dataset there (no dataset_info.json)")
        builder = tfds.builder_from_directory(path)
        info = _split_info(builder.info.splits, path, split)
        self._split = split
        self._features = _known_features(builder.info.features)
        if "image" not in self._features:
            raise UserError(
                f"data.path={path}: no image feature, only {sorted(builder.info.features)}"
            )
        skip = tfds.decode.SkipDecoding()
        decoders = {name: skip for name in ("image", "mask") if name in self._features}
        try:
            self._examples = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError:
            raise UserError(
                f"data.path={path}: its file format is {builder.info.file_format.value}, but only "
                "array_record can be read at random (see `tfds convert_format`)"
            ) from None
        self.class_names = tuple(self._features["label"].names) if "label" in self._features else ()
        sizes = [(file.name, file.stat().length) for file in info.filepaths]
        about = (split, len(self), sizes, self.class_names, self._sample())
        self._fingerprint = _digest("tfds", *about)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        found = self._examples[index]
        example = {name: _READ[name](found[name]) for name in self._features}
        example.setdefault("key", f"{self._split}/{index}")
        return example

    def _sample(self) -> list[str]:
        """Hashes of 16 images: ArrayRecord pads its files, so their sizes alone say little."""
        indices = {n * len(self) // 16 for n in range(16)}
        return [hashlib.sha256(self[index]["image"]).hexdigest() for index in sorted(indices)]

    def fingerprint(self) -> str:
        """Of the split's files, number of examples, class names and a sample of its images."""
        return self._fingerprint


def _split_info(splits, path, split: str):
    try:
        info = splits[split]
    except (KeyError, ValueError, AssertionError):  # TFDS: unknown name, bad syntax, bad slice
        raise UserError(f"data.split={split!r}: {path} has {sorted(splits)}") from None
    if info.num_examples == 0:
        raise UserError(f"data.path={path}, data.split={split!r}: holds no examples")
    return info


# How a feature becomes a value of the example.
_READ = {
    "image": bytes,
    "mask": bytes,
    "text": lambda value: value.decode("utf-8"),
    "key": lambda value: value.decode("utf-8"),
    "label": int,
}


def _known_features(features) -> dict:
    """The features we understand; those of a known name but another type are left out."""
    from tensorflow_datasets import features as kinds

    kind = {
        "image": kinds.Image,
        "mask": kinds.Image,
        "text": kinds.Text,
        "key": kinds.Text,
        "label": kinds.ClassLabel,
    }
    return {n: features[n] for n in kind if n in features and isinstance(features[n], kind[n])}


class ImageFolder:
    """Every image file below a directory, in sorted order of relative path.

    If all images lie in sub-directories, the first directory of the path is the class (its name,
    with underscores read as spaces).
    """

    def __init__(self, path: str | os.PathLike, split: str = ""):
        """List `path`, or its sub-directory `split` where one is given.

        Raises:
          UserError: not a directory, or no image in it.
        """
        self._root = Path(path) / split
        if not self._root.is_dir():
            raise UserError(
                f"data.path={path}, data.split={split!r}: {self._root} is not a directory"
            )
        self._files = _list_images(self._root)
        if not self._files:
            raise UserError(
                f"data.path={self._root}: no images found (looked for {', '.join(IMAGE_SUFFIXES)})"
            )
        folders = [name.split("/")[0] if "/" in name else "" for name, _ in self._files]
        classes = sorted(set(folders)) if all(folders) else []
        label = {name: index for index, name in enumerate(classes)}
        self._labels = [label.get(folder) for folder in folders]
        self.class_names = tuple(name.replace("_", " ") for name in classes)
        self._fingerprint = _digest("folder", self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        name, _ = self._files[index]
        try:
            example = {"image": (self._root / name).read_bytes(), "key": name}
        except OSError as error:
            raise UserError(f"{self._root / name}: cannot be read ({error.strerror})") from None
        if self.class_names:
            example["label"] = self._labels[index]
        return example

    def fingerprint(self) -> str:
        """Of the relative paths and sizes."""
        return self._fingerprint


def _list_images(root: Path) -> list[tuple[str, int]]:
    """(relative path, size) of every image below root, sorted; linked folders are not entered."""
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    images = (f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    return sorted((f.relative_to(root).as_posix(), f.stat().st_size) for f in images)


SOURCES = {"tfds": TfdsSource, "folder": ImageFolder}


def open_source(kind: str, path: str | os.PathLike, split: str) -> Source:
    """Open a source by the name of its kind, a key of SOURCES.

    Raises:
      UserError: unknown kind, or nothing usable at path.
    """
    if kind not in SOURCES:
        raise UserError(f"data.source={kind!r}: must be one of {sorted(SOURCES)}")
    return SOURCES[kind](path, split)
