"""Features of images and texts by any model that can be read: ``uta-jax embed``.

The network runs as it does in training and evaluation, on all devices, on all patches or on chosen
ones. Inputs are checked before weights are read; the output file appears whole or not at all.
"""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax import Array

from uta_jax import UserError, processes
from uta_jax import mesh as meshes
from uta_jax.checkpoint import load_run
from uta_jax.data.tokenizer import CLIP_NAME, open_tokenizer
from uta_jax.embed import inputs
from uta_jax.interop.files import read_json
from uta_jax.interop.teacher import load_clip
from uta_jax.metrics import progress_bar
from uta_jax.models.encode import check_ids, encode_images, encode_texts
from uta_jax.models.presets import ClipSpec, TextSpec

DTYPES = ("float32", "bfloat16")


def embed(
    model: str | Path,
    out: str | Path,
    *,
    images: str | Path = "",
    texts: str | Path = "",
    tokens: bool = False,
    keep: str | Path = "",
    batch_size: int = 64,
    dtype: str = "float32",
    overwrite: bool = False,
    preset: str = "",
) -> dict[str, tuple[int, ...]]:
    """Write the features of ``images`` and ``texts`` to the file ``out``; its names and shapes.

    ``out`` is an .npz of float32 arrays, none of them L2-normalised: ``image_features`` [n, e] and
    ``keys`` [n] (the path in the folder or tar, the row of an array), ``text_features`` [m, e].

    Args:
      model: a directory or file that ``load_clip`` reads, or the workdir of a run, whose newest
        student (the average, where one is kept) is used with the text tower that it has.
      images: a folder or a tar of images, prepared as the model wants them; or an .npy of
        normalised floats [n, 3, s, s] or [n, s, s, 3] at its input size.
      texts: a UTF-8 file, one text a line; empty lines count.
      tokens: also ``image_tokens`` [n, 1 + k, e], projected, CLS (or the pooled token) first.
      keep: an .npy of int [n, k]: row i holds the patches of image i, row-major from 0, that the
        network runs on beside CLS; ``image_tokens`` are in their order.
      batch_size: images or texts at a time, over all devices (rounded up to fill them evenly).
      dtype: of activations and products, float32 or bfloat16.
      preset: the architecture of weights that come without a configuration, as ``load_clip``.

    Raises:
      UserError: for anything missing, damaged or of the wrong shape; nothing is written then.
    """
    out = Path(out)
    _check_request(out, images, texts, tokens, keep, batch_size, dtype, overwrite)
    lines = inputs.read_lines(Path(texts)) if texts else []
    pictures = inputs.open_images(Path(images)) if images else None
    keep_nk = inputs.load_npy(Path(keep)) if keep else None
    processes.settle()
    spec, params, tokenizer_file = open_model(model, preset)
    if images:
        batches = inputs.batches_for(pictures, spec, images)
        inputs.check_keep(keep_nk, keep, len(batches), spec)
    if texts and spec.text is None:
        raise UserError(f"--texts: {model} has no text tower; leave --texts out")
    if texts:
        tokenizer = _tokenizer(spec, tokenizer_file, model)
    run = _Runner(batch_size, dtype)
    with _whole_npz(out, overwrite) as archive:
        shapes = {}
        if images:
            shapes |= _embed_images(archive, run, batches, keep_nk, tokens, spec, params["vision"])
        if texts:
            shapes |= _embed_texts(archive, run, lines, tokenizer, spec.text, params["text"])
    return shapes


def open_model(path: str | Path, preset: str = "") -> tuple[ClipSpec, dict, Path | None]:
    """Specification, parameters and tokenizer file: a run's student, or what ``load_clip`` reads.

    The file is None where the tokenizer is the built-in one of CLIP. ``preset``: as ``load_clip``.
    """
    if is_run(path):
        run = load_run(path)
        return run.spec, run.clip, run.teacher.tokenizer_file if run.teacher else None
    found = load_clip(path, preset=preset)
    return found.spec, found.params, found.tokenizer_file


def is_run(path: str | Path) -> bool:
    """Whether a run trained in ``path``: checkpoints beside a configuration that is a recipe."""
    config = Path(path) / "config.json"  # a model of other libraries has one, too
    saved = (Path(path) / "checkpoints").is_dir() and config.is_file()
    return saved and "student" in read_json(config)


def _tokenizer(
    spec: ClipSpec, file: Path | None, model: str | Path
) -> Callable[[list[str]], np.ndarray]:
    if spec.tokenizer != CLIP_NAME and file is None:
        raise UserError(
            f"--texts: {model} lacks its tokenizer {spec.tokenizer!r}: put that file beside the "
            "weights"
        )
    folder = file and file.parent
    return open_tokenizer(spec.tokenizer, folder, spec.text.context, spec.cleaning)


def _check_request(out, images, texts, tokens, keep, batch_size, dtype, overwrite) -> None:
    if not (images or texts):
        raise UserError("nothing to embed: give --images, --texts or both")
    if (tokens or keep) and not images:
        raise UserError(f"--{'tokens' if tokens else 'keep'} is about images: give --images")
    if batch_size < 1:
        raise UserError(f"--batch-size={batch_size}: must be at least 1")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}")
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: must end in .npz")
    _check_free(out, overwrite)


def _check_free(out: Path, overwrite: bool) -> None:
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"--out={out}: cannot be written ({error})") from None
    if out.is_dir():
        raise UserError(f"--out={out}: is a directory; give a file")
    if not overwrite:
        raise UserError(f"--out={out}: already exists; remove it or ask for --overwrite")


# The network


class _Runner:
    """Batches of host arrays through a jitted function, split over all devices of this process."""

    def __init__(self, batch_size: int, dtype: str):
        self.mesh, self.dtype, self._wanted = meshes.make_mesh(), dtype, batch_size

    def batch_size(self, examples: int) -> int:
        """What the devices share evenly, no more than needed."""
        devices = self.mesh.size
        return -(-min(self._wanted, examples) // devices) * devices

    def __call__(
        self, encode: Callable, params: dict, total: int, batches: Iterable[tuple], unit: str
    ) -> Iterator[np.ndarray]:
        """Yield ``encode(params, *batch)`` of every batch, as NumPy, without the filling."""
        params = jax.device_put(params, meshes.replicated(self.mesh))
        size, waiting = self.batch_size(total), None
        with progress_bar(total, 0, unit=unit, desc="embed") as bar:
            for batch in batches:
                # Dispatched before the previous one is fetched: the devices work meanwhile.
                found, count = encode(params, *self._placed(batch, size)), len(batch[0])
                if waiting is not None:
                    yield _fetched(waiting, bar)
                waiting = found, count
            if waiting is not None:
                yield _fetched(waiting, bar)

    def _placed(self, batch: tuple, size: int) -> list[Array]:
        """On the devices, the last batch filled up by its last row: one shape, one compilation."""
        rows = np.minimum(np.arange(size), len(batch[0]) - 1)
        filled = (x if len(x) == size else x[rows] for x in batch)
        return [jax.device_put(x, meshes.batch_sharding(self.mesh)) for x in filled]


def _fetched(waiting: tuple[Array, int], bar) -> np.ndarray:
    found, count = waiting
    bar.update(count)
    return np.asarray(found)[:count]


def _embed_images(archive, run: _Runner, images, keep_nk, tokens, spec, params) -> dict:
    """Write image_features and keys; with ``tokens`` image_tokens, batch by batch to the disk."""
    features, keys, n = [], [], len(images)

    def batches() -> Iterator[tuple]:
        size = run.batch_size(n)
        for start in range(0, n, size):
            rows = range(start, min(start + size, n))
            names, pixels = images[rows]
            keys.extend(names)
            yield (pixels,) if keep_nk is None else (pixels, np.int32(keep_nk[start : rows.stop]))

    encode = partial(encode_images, spec=spec, dtype=run.dtype, tokens=tokens)
    found = run(encode, params, n, batches(), "image")
    kept = spec.vision.tokens if keep_nk is None else keep_nk.shape[1]
    shapes = {"image_tokens": (n, 1 + kept, spec.vision.out_dim)} if tokens else {}
    if tokens:
        found = _noted(found, features)
        _write_rows(archive, "image_tokens", shapes["image_tokens"], found)
    else:
        features.extend(found)
    arrays = {"image_features": np.concatenate(features), "keys": np.array(keys)}
    return shapes | _write_arrays(archive, arrays)


def _noted(tokens: Iterable[np.ndarray], features: list) -> Iterator[np.ndarray]:
    """Pass [b, 1 + k, e] on, and keep what stands first."""
    for batch in tokens:
        features.append(batch[:, 0].copy())
        yield batch


def _embed_texts(archive, run: _Runner, lines, tokenizer, spec: TextSpec, params) -> dict:
    size = run.batch_size(len(lines))
    starts = range(0, len(lines), size)
    batches = ((check_ids(tokenizer(lines[i : i + size]), spec),) for i in starts)
    encode = partial(encode_texts, spec=spec, dtype=run.dtype)
    found = run(encode, params, len(lines), batches, "text")
    return _write_arrays(archive, {"text_features": np.concatenate(list(found))})


# What comes out


@contextmanager
def _whole_npz(out: Path, overwrite: bool) -> Iterator[zipfile.ZipFile]:
    """A new archive that becomes ``out`` at the end, or leaves no trace."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".embed.", dir=out.parent) as near:
            work = Path(near) / "new.npz"
            with zipfile.ZipFile(work, "w") as archive:
                yield archive
            _check_free(out, overwrite)  # again: embedding takes a while
            work.rename(out)
    except OSError as error:
        raise UserError(f"--out={out}: nothing written ({error})") from error


def _write_rows(archive, name: str, shape: tuple, blocks: Iterable[np.ndarray]) -> None:
    """A float32 array whose rows come in blocks: it is never whole in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)


def _write_arrays(archive, arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    return {name: array.shape for name, array in arrays.items()}
