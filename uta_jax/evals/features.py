"""One sharded, padded, masked forward over a data set, shared by all evaluators.

Every example counts once: the filling of the last batch and examples that cannot be used are left
out. Image features are kept for as long as the object lives and, given a folder, on the disk, by
what they depend on: the weights, the data's fingerprint, and how images are prepared.
"""

import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import xxhash
from jax import Array
from jax.sharding import Mesh

from uta_jax import UserError, processes
from uta_jax import mesh as meshes
from uta_jax.data.files import digest
from uta_jax.data.loader import Reading, eval_batches
from uta_jax.data.sources import Source
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.models.encode import check_ids, encode_images, encode_texts
from uta_jax.models.presets import ClipSpec


class Pooled(NamedTuple):
    """What stands for each image, in the order of the data; unusable examples are not in it."""

    feature_ne: np.ndarray  # fp32, not L2-normalised
    index_n: np.ndarray  # int32, which example of the source
    label_n: np.ndarray  # int32; [0] of a source without labels


class Features:
    """Features of images and texts by any model, on all devices."""

    def __init__(
        self,
        batch_size: int,
        mesh: Mesh,
        reading: Reading = Reading(),
        folder: Path | None = None,
        watched: Callable[[Iterator[dict]], Iterator[dict]] = iter,
    ):
        """``folder``: where image features are kept. ``watched``: wraps the batches of images, to
        leave an evaluation off. ``batch_size`` is rounded up to fill the devices evenly."""
        self.mesh, self.batch_size = mesh, -(-batch_size // mesh.size) * mesh.size
        self._reading, self._folder, self._watched = reading, folder, watched
        self._found: dict[str, Pooled] = {}

    def pooled(self, vision: dict, spec: ClipSpec, source: Source) -> Pooled:
        """The image features of a source; computed once.

        Raises:
          UserError: features that are not finite, or nothing usable in the source.
        """
        key = _key(vision, spec, source)
        path = self._folder and self._folder / f"{key}.npz"
        if key not in self._found:
            kept = _load(path)
            # All go the same way: a forward waits for every process.
            if path and not all(processes.gather("kept features", kept is not None)):
                kept = None
            self._found[key] = kept or self._forward(vision, spec, source)
            _save(path, self._found[key])
        return self._found[key]

    def tokens(self, vision: dict, spec: ClipSpec, source: Source) -> Iterator[tuple[Array, dict]]:
        """All projected tokens [b, 1 + n, e], CLS first, fp32, on the devices, with their batch.

        Not kept: for a thousand images they are as large as the model.
        """
        encode = partial(encode_images, self.placed(vision), spec=spec, tokens=True)
        return ((encode(batch["image"]), batch) for batch in self.batches(spec, source))

    def texts(self, text: dict, spec: ClipSpec, texts: Sequence[str]) -> np.ndarray:
        """Text features fp32 [m, e], not L2-normalised."""
        text, size = self.placed(text), self.batch_size
        ids_ml = check_ids(Tokenizer(spec.text.context)(list(texts)), spec.text)
        found = []
        for start in range(0, len(ids_ml), size):
            ids_bl = ids_ml[np.minimum(np.arange(start, start + size), len(ids_ml) - 1)]
            ids_bl = jax.device_put(ids_bl, meshes.batch_sharding(self.mesh))
            found.append(meshes.fetch(encode_texts(text, ids_bl, spec=spec.text)))
        return np.concatenate(found)[: len(ids_ml)]

    def placed(self, params: dict) -> dict:
        """A whole copy on every device, once instead of with every batch."""
        return meshes.replicate(self.mesh, params)

    def batches(self, spec: ClipSpec, source: Source) -> Iterator[dict]:
        """The images as the model of ``spec`` takes them, every example once."""
        batches = eval_batches(
            source,
            batch_size=self.batch_size,
            image_size=spec.vision.image_size,
            sharding=meshes.batch_sharding(self.mesh),
            reading=self._reading,
            **_transform(spec),
        )
        return self._watched(batches)

    def _forward(self, vision: dict, spec: ClipSpec, source: Source) -> Pooled:
        encode, rows, waiting = partial(encode_images, self.placed(vision), spec=spec), [], None
        for batch in self.batches(spec, source):
            # Dispatched before the one before is fetched: the devices work meanwhile.
            found = encode(batch["image"]), batch
            if waiting:
                rows.append(_valid(*waiting))
            waiting = found
        rows.append(_valid(*waiting))
        pooled = Pooled(*(np.concatenate(column) for column in zip(*rows, strict=True)))
        _check_finite(pooled, source)
        return pooled


def _valid(found: Array, batch: dict) -> Pooled:
    small = {name: batch[name] for name in ("index", "label", "valid") if name in batch}
    feature_be, small = meshes.fetch((found, small))
    rows = small["valid"]
    label = small["label"][rows] if "label" in small else np.zeros(0, np.int32)
    return Pooled(feature_be[rows], small["index"][rows], label)


def _check_finite(pooled: Pooled, source: Source) -> None:
    bad = pooled.index_n[~np.isfinite(pooled.feature_ne).all(axis=1)]
    if len(bad):
        raise UserError(
            f"the image features of {len(bad)} of {len(pooled.index_n)} examples are not finite "
            f"(the first: {source[int(bad[0])]['key']}): the weights are damaged or have diverged"
        )


def _transform(spec: ClipSpec) -> dict:
    return {name: getattr(spec, name) for name in ("resize", "interpolation", "resize_size")}


def transform_in_words(spec: ClipSpec) -> str:
    """How images are prepared for a model, for the record of a measurement."""
    size = spec.vision.image_size
    side = "both sides" if spec.resize == "squash" else "short side"
    return f"{spec.interpolation}, {side} to {spec.resize_size or size}, centre crop {size}"


def _key(vision: dict, spec: ClipSpec, source: Source) -> str:
    about = asdict(replace(spec, text=None))  # the text tower may change, and does not matter
    return digest(weights_hash(vision), source.fingerprint(), json.dumps(about, sort_keys=True))


def weights_hash(params: dict) -> str:
    """32 hexadecimal digits of parameters on the host: names, shapes, types and bytes."""
    found = xxhash.xxh3_128()
    for path, leaf in jax.tree.leaves_with_path(params):
        leaf = np.asarray(leaf)
        found.update(f"{meshes.path_name(path)} {leaf.shape} {leaf.dtype}".encode())
        found.update(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data)
    return found.hexdigest()


def _load(path: Path | None) -> Pooled | None:
    """What was kept; None where there is nothing, or half a file."""
    if path is None or not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Pooled(*(file[name] for name in Pooled._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path | None, pooled: Pooled) -> None:
    """The file appears whole or not at all; only the first process writes."""
    if path is None or path.exists() or not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        with place.open("wb") as file:
            np.savez(file, **pooled._asdict())
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)
