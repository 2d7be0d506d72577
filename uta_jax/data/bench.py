"""How fast examples are read, decoded, cropped and put into batches: `uta-jax data bench`.

Everything is measured in turns within one run, so that a busy machine is busy for all, and told as
medians over the turns. A step is timed by the processor time of the one thread that it runs on. A
loader is timed with its workers, by the wall clock, once it runs evenly; its rate per core is that
of one worker. Where torchvision is installed, its Pillow pipeline is measured beside ours.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from uta_jax import UserError, allocator
from uta_jax.data.decode import decode, decode_jpeg, jpeg_size
from uta_jax.data.examples import random_at
from uta_jax.data.files import output
from uta_jax.data.loader import Reading, TrainLoader
from uta_jax.data.pictures import Pictures
from uta_jax.data.sources import Source
from uta_jax.data.transforms import jpeg_scale, sample_crop, train_transform

RATIO = (3 / 4, 4 / 3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
BATCH = 32
TURNS = 7
DECODE, CROP, NORMALISE = "decode", "crop, resize, flip", "normalise on the host"
STEPS = {
    DECODE: "bare decoding of whole JPEGs, at the fraction of their size that the crop allows",
    CROP: "the whole transform to uint8: decode, crop, resize, flip",
    NORMALISE: "the same, normalised to float32 on the host (training does so on the device)",
    "torchvision": "torchvision: Pillow, RandomResizedCrop, flip, ToTensor, Normalize",
    "loader": "whole loader to uint8 batches, threads",
    "loader, processes": "whole loader to uint8 batches, worker processes",
    "torchvision loader": "torchvision's in a DataLoader with as many workers, to float32 batches",
}


class TorchvisionExamples:
    """A map-style dataset for a DataLoader: (pixels float32 [3, s, s], index)."""

    def __init__(self, source: Source, image_size: int, crop_scale: tuple[float, float]):
        self._source, self._size, self._scale = source, image_size, crop_scale
        self._transform = None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        return self.pixels(self._source[index]["image"]), index

    def pixels(self, data: bytes):
        """Decode, crop, flip and normalise one image the usual way."""
        if self._transform is None:  # in the worker that uses it
            from torchvision import transforms

            self._transform = transforms.Compose(
                [
                    transforms.RandomResizedCrop(
                        self._size,
                        self._scale,
                        RATIO,
                        interpolation=transforms.InterpolationMode.BICUBIC,
                    ),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            )
        return self._transform(Image.open(io.BytesIO(data)).convert("RGB"))


def bench(
    source: Source | None = None,
    image_size: int = 224,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    seconds: float = 30.0,
    workers: int = 1,
    json_file: str | Path | None = None,
) -> dict:
    """Measure, print a table, and return its figures.

    Args:
      source: where images come from; by default JPEGs of 500x375 written for the purpose.
      image_size: of the crops, in pixels.
      crop_scale: as in sample_crop.
      seconds: about how long to measure, without preparations.
      workers: of every loader.
      json_file: where given, the figures are written there too.

    Returns:
      images_per_s (per core, by step), ratios, and what was measured.

    Raises:
      UserError: fewer examples than one batch, sizes below 1, or a file that cannot be written.
      BadExample: an example of the first hundred that cannot be decoded.
    """
    for name, value in (("image_size", image_size), ("workers", workers)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be 1 or more")
    allocator.keep_blocks()  # as in a worker
    with ExitStack() as stack:
        json_out = stack.enter_context(output(json_file)) if json_file else None
        if source is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="uta_jax_bench_"))
            source = Pictures(Path(folder), repeats=1000)
        if len(source) < BATCH:
            raise UserError(f"data bench: {len(source)} examples; at least {BATCH} are needed")
        images = [source[n]["image"] for n in range(min(len(source), 100))]
        torchvision = _torchvision()
        steps = _steps(source, images, image_size, crop_scale, torchvision)
        turns = {name: partial(_timed_step, step, len(images)) for name, step in steps.items()}
        loaders = _loaders(source, image_size, crop_scale, workers, torchvision)
        for name, batches in loaders.items():
            stack.enter_context(closing(batches))
            turns[name] = partial(_timed_loader, batches, workers)
        times = _in_turns(turns, seconds)
        result = {
            "images": len(images),
            "bytes_per_image": round(statistics.mean(map(len, images))),
            "image_size": image_size,
            "crop_scale": list(crop_scale),
            "workers": workers,
            "images_per_s": {name: 1 / statistics.median(of) for name, of in times.items()},
            "ratios": _ratios(times),
        }
        if json_out:
            json_out.write(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return result


def table(result: dict) -> str:
    """The figures of `bench` in lines to print."""
    lines = [
        f"{result['images']} images of {result['bytes_per_image']} bytes on average, crops of "
        f"{'-'.join(f'{s:g}' for s in result['crop_scale'])} of the area to "
        f"{result['image_size']} pixels, loaders with {result['workers']} worker(s)",
        "images/s per core",
    ]
    lines += [f"{rate:9.0f}  {STEPS[name]}" for name, rate in result["images_per_s"].items()]
    return "\n".join(lines + [f"{ratio:9.2f}  {name}" for name, ratio in result["ratios"].items()])


def normalised(image_bhwc: np.ndarray) -> np.ndarray:
    """uint8 [..., h, w, 3] to float32, normalised with CLIP's statistics."""
    *_, width, channels = image_bhwc.shape
    # Whole rows: over three channels alone, numpy's inner loop would be three long.
    scale = np.tile(np.float32(1 / 255) / np.float32(STD), width)
    shift = np.tile(np.float32(MEAN) / np.float32(STD), width)
    rows = image_bhwc.reshape(*image_bhwc.shape[:-2], width * channels)
    out = np.multiply(rows, scale, dtype=np.float32)
    return np.subtract(out, shift, out=out).reshape(image_bhwc.shape)


def _steps(source, images, size, scale, torchvision: bool) -> dict[str, Callable[[int], object]]:
    """What is timed on one thread: name -> function of the number of an image."""

    sizes = [_decoding(data, random_at(0, n), size, scale) for n, data in enumerate(images)]

    def bare(n: int):
        return decode_jpeg(images[n], *sizes[n]) if sizes[n] else decode(images[n])

    def crop(n: int):
        return train_transform(images[n], random_at(0, n), size, scale, RATIO)

    steps = {DECODE: bare, CROP: crop, NORMALISE: lambda n: normalised(crop(n))}
    if torchvision:
        theirs = TorchvisionExamples(source, size, scale)
        steps["torchvision"] = lambda n: _one_thread(theirs.pixels, images[n])
    return steps


def _decoding(data: bytes, rng: Random, size: int, scale) -> tuple | None:
    """(size, scale) with which train_transform calls decode_jpeg; None if Pillow decodes."""
    header = jpeg_size(data)
    if not header:
        return None
    rng.random()  # the flip
    reduction = jpeg_scale(sample_crop(rng, *header, scale, RATIO), size)
    return None if decode_jpeg(data, header, reduction) is None else (header, reduction)


def _loaders(source, size, scale, workers, torchvision: bool) -> dict[str, Iterator]:
    """Endless iterators over batches, by name, that can be closed."""

    def ours(reading: Reading) -> TrainLoader:
        return TrainLoader(
            source,
            batch_size=BATCH,
            seed=0,
            image_size=size,
            crop_scale=scale,
            crop_ratio=RATIO,
            reading=reading,
            process_index=0,  # JAX, which would know, is not started
            process_count=1,
        )

    loaders = {
        "loader": ours(Reading(threads=workers)),
        "loader, processes": ours(Reading(workers=workers)),
    }
    if torchvision:
        loaders["torchvision loader"] = _torchvision_batches(source, size, scale, workers)
    return loaders


def _torchvision() -> bool:
    """Whether torchvision can be imported."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return False
    return True


def _one_thread(function: Callable, *args):
    """As in a DataLoader's worker: PyTorch's threads only slow such small tensors down."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(threads)


def _torchvision_batches(source, size, scale, workers) -> Iterator:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        TorchvisionExamples(source, size, scale),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # JAX's threads may be running: forking is not safe
    )
    while True:
        yield from loader


def _timed_step(step: Callable[[int], object], images: int, seconds: float) -> float:
    """Processor seconds of this thread per image of a step."""
    start, done = time.thread_time(), 0
    while not done or done % images or time.thread_time() - start < seconds:
        step(done % images)
        done += 1
    return (time.thread_time() - start) / done


def _timed_loader(batches: Iterator, workers: int, seconds: float) -> float:
    """Seconds of one worker per image, once the batches made in advance are used up."""
    for _ in range(2 * workers + 3):
        next(batches)
    start, done = time.perf_counter(), 0
    while done < 4 or time.perf_counter() - start < seconds:
        next(batches)
        done += 1
    return workers * (time.perf_counter() - start) / (done * BATCH)


def _in_turns(turns: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Every turn's time per image, after a round of warming up."""
    each = seconds / (TURNS * len(turns))
    times = {name: [] for name in turns}
    for turn in range(TURNS + 1):
        for name, measure in turns.items():
            time.sleep(0.5)  # until the loader before has made its batches in advance
            taken = measure(each if turn else 0.0)
            times[name] += [taken] if turn else []
    return times


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the turns of quotients of two times of the same turn."""

    def ratio(slow: str, fast: str) -> float:
        pairs = zip(times[slow], times[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    ratios = {"time of the whole transform / of bare decoding": ratio(CROP, DECODE)}
    if "torchvision" in times:
        ratios |= {
            "torchvision's time / our transform's, to uint8": ratio("torchvision", CROP),
            "torchvision's time / our transform's, normalised": ratio("torchvision", NORMALISE),
            "torchvision's loader (float32) / our loader (uint8), threads": ratio(
                "torchvision loader", "loader"
            ),
            "torchvision's loader (float32) / our loader (uint8), processes": ratio(
                "torchvision loader", "loader, processes"
            ),
        }
    return ratios
