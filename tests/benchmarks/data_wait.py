"""How long a step waits for its data: python tests/benchmarks/data_wait.py [--workers N ...]

The device is a sleep of 50 ms a step, in which real batches (JPEGs of 256 pixels in memory, random
crops to 128) are loaded, and put on the CPU device as they would be on any other. Every choice of
workers is measured in turns, in one run. Stated are milliseconds and, beside them, what share of
the time of a step the workers are busy: near 1, the pipeline cannot deliver and waits are its own.
"""

import argparse
import io
import json
import statistics
import time

import jax
import numpy as np
from PIL import Image

from uta_jax.data.loader import Reading, TrainLoader

STEP_S, WARM = 0.05, 5


class Jpegs:
    """64 JPEGs in memory, over and over."""

    class_names, fields = (), ("image", "key")

    def __init__(self):
        rng = np.random.default_rng(0)
        self._images = []
        for _ in range(64):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            self._images.append(buffer.getvalue())

    def __len__(self):
        return 64_000

    def __getitem__(self, index):
        return {"image": self._images[index % 64], "key": str(index)}

    def fingerprint(self):
        return "jpegs"

    def describe(self):
        return {}


def waits(loader, steps):
    """Milliseconds that each step waited."""
    found = []
    for _ in range(steps):
        next(loader)
        found.append(1000 * loader.data_wait_s)
        time.sleep(STEP_S)
    return found


def load_s(loader, batches=20):
    """Seconds that a batch takes when nothing else is to be done."""
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return (time.perf_counter() - start) / batches


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    loaders = {
        workers: TrainLoader(
            Jpegs(),
            batch_size=args.batch_size,
            seed=0,
            image_size=128,
            crop_scale=(0.2, 1.0),
            sharding=jax.NamedSharding(mesh, jax.P("data")),
            reading=Reading(workers=workers),
        )
        for workers in args.workers
    }
    found, busy = {w: [] for w in loaders}, {w: [] for w in loaders}
    for loader in loaders.values():
        waits(loader, WARM)
    for _ in range(args.rounds):
        for workers, loader in loaders.items():
            found[workers] += waits(loader, args.steps)
            busy[workers].append(load_s(loader) / STEP_S)
    for workers, loader in loaders.items():
        loader.close()
        of = sorted(found[workers])
        print(
            json.dumps(
                {
                    "workers": workers,
                    "steps": len(of),
                    "wait_ms_median": round(statistics.median(of), 3),
                    "wait_ms_p90": round(of[len(of) * 9 // 10], 3),
                    "wait_ms_max": round(of[-1], 3),
                    "load_per_step": round(statistics.median(busy[workers]), 3),
                }
            )
        )


if __name__ == "__main__":
    from data_wait import main  # by this name the workers find Jpegs, too

    main()
