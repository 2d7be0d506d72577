"""Zero-shot segmentation: every patch against the names of the classes.

Protocol (ClearCLIP, SAIL evaluation: sliding window): the whole image, its short side brought to
``eval.window_side`` and both sides to whole patches, is covered by windows of the model's input
size; the cosines of a patch with the classes are averaged over the windows that hold it, brought to
the size of the mask (bilinear), and the highest one wins. Pixels of the background (0 in the mask)
count for nothing. mIoU is the mean over classes that are in a mask or were predicted.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from uta_jax import UserError
from uta_jax import mesh as meshes
from uta_jax.data import BadExample
from uta_jax.data.decode import decode
from uta_jax.data.sources import Source
from uta_jax.data.transforms import FILTERS
from uta_jax.evals.names import class_names
from uta_jax.evals.setting import Setting, needs
from uta_jax.evals.zeroshot import all_templates, classifier
from uta_jax.models.encode import encode_images
from uta_jax.models.presets import ClipSpec
from uta_jax.objectives import normalize

HEADLINE = ("miou", "pixel_accuracy")
_THREADS = 2  # that decode
_AHEAD = 32  # images decoded at a time


class Scene(NamedTuple):
    """An image cut into windows, and what is at each pixel of it."""

    windows: np.ndarray  # uint8 [w, s, s, 3]
    corners: list[tuple[int, int]]  # of the windows, (row, column) in patches
    grid: tuple[int, int]  # of the whole image, in patches
    mask: np.ndarray  # uint8 or more [height, width]: 0 background, class c stored as c + 1


def run(params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    """miou, pixel_accuracy (shares), n, and ``class/NUMBER NAME``: the IoU of each class."""
    del frozen
    classes, confusion, count = _classes(cfg), 0, 0
    for scene, class_hw in predictions(params, cfg):
        confusion = confusion + _confusion(scene.mask, class_hw, len(classes))
        count += 1
    return ious(confusion, classes) | {"n": count}


def predictions(params: dict, cfg: Setting) -> Iterator[tuple[Scene, np.ndarray]]:
    """Every scene, in order, with the class at each of its pixels: int [height, width]."""
    weights_ce = jnp.asarray(classifier(params["text"], cfg, _classes(cfg)))
    vision = cfg.features.placed(params["vision"])
    encode = partial(_cosines, vision, weights_ce, spec=cfg.spec)
    for scene, cosine_wggc in _scored(_scenes(cfg.data("masks"), cfg), encode, cfg):
        yield scene, predict(scene, cosine_wggc)


def _classes(cfg: Setting) -> tuple[str, ...]:
    source = cfg.data("masks")
    needs(source, "mask", "config.eval.masks")
    return class_names(source, cfg.eval.classnames)


def protocol(cfg: Setting) -> dict[str, object]:
    """What has to be known beside the numbers."""
    window, side, stride = _geometry(cfg)
    return {
        "images": f"{cfg.spec.interpolation}, short side to {side}",
        "windows": f"{window} pixels at {stride}",
        "templates": len(all_templates(cfg)),
        "background": "not counted",
        "mean over": "classes that are in a mask or were predicted",
    }


def _geometry(cfg: Setting) -> tuple[int, int, int]:
    """(window, short side, stride) in pixels, all multiples of the patch.

    Raises:
      UserError: where they cannot be.
    """
    vision = cfg.spec.vision
    window, patch = vision.grid * vision.patch_size, vision.patch_size
    side, stride = cfg.eval.window_side or window, cfg.eval.window_stride or _half(window, patch)
    for key, value, least in (("side", side, window), ("stride", stride, patch)):
        if value % patch or value < least:
            raise UserError(
                f"config.eval.window_{key}={value}: must be a multiple of the patch size {patch}, "
                f"at least {least}"
            )
    if stride > window:
        raise UserError(f"config.eval.window_stride={stride}: leaves gaps; at most {window}")
    return window, side, stride


def _half(window: int, patch: int) -> int:
    return max(window // 2 // patch, 1) * patch


# Images to windows


def _scenes(source: Source, cfg: Setting) -> Iterator[Scene]:
    """The scenes in order; every process of a run cuts all of them."""
    window, side, stride = _geometry(cfg)
    cut = partial(_scene, source, cfg.spec, window, side, stride)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(source), _AHEAD):
            yield from pool.map(cut, range(start, min(start + _AHEAD, len(source))))


def _scene(
    source: Source, spec: ClipSpec, window: int, side: int, stride: int, index: int
) -> Scene:
    """Raises UserError for an example that cannot be used: a score of the rest would mislead."""
    key = f"example {index}"
    try:
        example = source[index]
        key = example["key"]
        image = decode(example["image"])
        mask = np.asarray(decode(example["mask"]))
    except BadExample as error:
        raise UserError(f"config.eval.masks: {key}: {error}") from None
    if mask.shape != image.size[::-1]:
        raise UserError(
            f"config.eval.masks: {key}: a mask of {'x'.join(map(str, mask.shape[1::-1]))} for an "
            f"image of {'x'.join(map(str, image.size))}: it needs one number for each pixel"
        )
    pixels, patch = _resized(image, side, spec), spec.vision.patch_size
    rows, columns = (_starts(length, window, stride) for length in pixels.shape[:2])
    places = [(row, column) for row in rows for column in columns]
    cut = np.stack([pixels[r : r + window, c : c + window] for r, c in places])
    grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
    return Scene(cut, [(r // patch, c // patch) for r, c in places], grid, mask)


def _resized(image: Image.Image, side: int, spec: ClipSpec) -> np.ndarray:
    """RGB with its short side at ``side``, its long one at the nearest number of patches."""
    patch, short = spec.vision.patch_size, min(image.size)
    size = tuple(max(round(length * side / short / patch) * patch, side) for length in image.size)
    if size != image.size:
        image = image.resize(size, FILTERS[spec.interpolation])
    return np.asarray(image.convert("RGB"))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover ``length``; the last one ends with it."""
    starts = list(range(0, length - window + 1, stride))
    return starts if starts[-1] == length - window else [*starts, length - window]


# Windows to cosines


@partial(jax.jit, static_argnames="spec")
def _cosines(vision: dict, weights_ce: Array, image_bhwc: Array, *, spec: ClipSpec) -> Array:
    """Cosines of every patch with every class: [b, g, g, c]."""
    tokens_bne = encode_images(vision, image_bhwc, spec=spec, tokens=True)[:, 1:]
    cosine_bnc = jnp.matmul(normalize(tokens_bne), weights_ce.T, precision="highest")
    return cosine_bnc.reshape(len(image_bhwc), spec.vision.grid, spec.vision.grid, -1)


def _scored(scenes: Iterator[Scene], encode, cfg: Setting) -> Iterator[tuple[Scene, np.ndarray]]:
    """Each scene with the cosines of its windows; windows of several scenes share a batch."""
    size, sharding = cfg.features.batch_size, meshes.batch_sharding(cfg.features.mesh)
    ready, waiting, last = [], [], False
    while not last or waiting:
        while not last and sum(len(scene.windows) for scene in waiting) < size:
            scene = next(scenes, None)
            last = scene is None
            waiting += [] if last else [scene]
        if not waiting:
            return
        windows = np.concatenate([scene.windows for scene in waiting])
        for start in range(0, len(windows), size):
            rows = np.minimum(np.arange(start, start + size), len(windows) - 1)
            found = meshes.fetch(encode(jax.device_put(windows[rows], sharding)))
            ready.append(found[: len(windows) - start])
        cosines = np.concatenate(ready)
        for scene in waiting:
            yield scene, cosines[: len(scene.windows)]
            cosines = cosines[len(scene.windows) :]
        ready, waiting = [], []


# Cosines to classes, and to figures


def predict(scene: Scene, cosine_wggc: np.ndarray) -> np.ndarray:
    """The class at every pixel of the mask: int [height, width]."""
    side, classes = cosine_wggc.shape[1], cosine_wggc.shape[3]
    total, times = np.zeros((*scene.grid, classes), np.float32), np.zeros((*scene.grid, 1))
    for (row, column), cosine_ggc in zip(scene.corners, cosine_wggc, strict=True):
        total[row : row + side, column : column + side] += cosine_ggc
        times[row : row + side, column : column + side] += 1
    mean_ijc = (total / times).astype(np.float32)
    down, across = (
        _bilinear(*sizes) for sizes in zip(scene.mask.shape, scene.grid, strict=True)
    )  # [height, i], [width, j]
    by_row = np.tensordot(down, mean_ijc, axes=1)
    return np.stack([(across @ row_jc).argmax(axis=1) for row_jc in by_row])


def _bilinear(out: int, given: int) -> np.ndarray:
    """The weights [out, given] of linear interpolation between the centres of cells."""
    place = np.clip((np.arange(out) + 0.5) * given / out - 0.5, 0, given - 1)
    low = np.minimum(place.astype(int), max(given - 2, 0))
    weights = np.zeros((out, given), np.float32)
    weights[np.arange(out), low] = 1 - (place - low)
    weights[np.arange(out), np.minimum(low + 1, given - 1)] += place - low
    return weights


def _confusion(mask: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true and predicted class [c, c], without the background.

    Raises:
      UserError: a number in the mask that is no class.
    """
    if mask.max() > classes:
        raise UserError(
            f"config.eval.masks: a mask holds {mask.max()}, but there are {classes} classes: 0 is "
            "background, and class c is stored as c + 1"
        )
    seen = mask > 0
    pair = (mask[seen].astype(np.int64) - 1) * classes + predicted[seen]
    return np.bincount(pair, minlength=classes**2).reshape(classes, classes)


def ious(confusion: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """miou, pixel_accuracy and the IoU of each class from pixels by true and predicted class."""
    if not confusion.sum():
        raise UserError("config.eval.masks: every mask is all background; nothing can be measured")
    right, union = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    union = union - right
    per_class = {
        f"class/{number} {name}": float(right[number] / union[number])
        for number, name in enumerate(classes)
        if union[number]
    }
    miou = float(np.mean(list(per_class.values())))
    return {"miou": miou, "pixel_accuracy": float(right.sum() / confusion.sum())} | per_class
