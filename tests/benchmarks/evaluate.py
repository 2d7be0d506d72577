"""Evaluation throughput against the bare forward at the same batch, in one interleaved run.

    python tests/benchmarks/evaluate.py [--preset clip_b32] [--examples 512] [--batch 32]

`features` is what every evaluator calls: reading, decoding and resizing PNGs, the forward, the
features back on the host. `forward` is the same network on one batch that lies on the devices.
Printed for each round: images/s of both, and their ratio; at the end the median ratio.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from uta_jax import mesh as meshes
from uta_jax import processes
from uta_jax.data import emoji_scenes
from uta_jax.data.loader import Reading
from uta_jax.data.sources import TfdsSource
from uta_jax.evals.features import Features
from uta_jax.models.encode import encode_images
from uta_jax.models.presets import CLIP
from uta_jax.models.vit import init_vit


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="clip_b32")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    processes.settle()
    spec, mesh = CLIP[args.preset], meshes.make_mesh()
    vision = jax.tree.map(np.asarray, init_vit(spec.vision, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        source = _scenes(Path(folder) / "emoji_scenes", args.examples, spec.vision.image_size)
        ratios = [_round(spec, mesh, vision, source, args) for _ in range(args.rounds + 1)]
    print(f"median ratio {statistics.median(ratios[1:]):.3f} (the first round compiled)")


def _scenes(out: Path, examples: int, size: int) -> TfdsSource:
    emoji_scenes.build(out, train=1, val_single=examples, val_scenes=1, size=size, progress=False)
    return TfdsSource(out, "val_single")


def _round(spec, mesh, vision: dict, source, args) -> float:
    features = Features(args.batch, mesh, Reading())
    pixels, batches = next(features.batches(spec, source))["image"], args.examples // args.batch
    placed = features.placed(vision)
    start = time.perf_counter()
    for _ in range(batches):
        found = encode_images(placed, pixels, spec=spec)
    found.block_until_ready()
    bare = batches * args.batch / (time.perf_counter() - start)
    start = time.perf_counter()
    features.pooled(vision, spec, source)
    whole = len(source) / (time.perf_counter() - start)
    print(f"forward {bare:8.1f} images/s   features {whole:8.1f} images/s   {whole / bare:.3f}")
    return whole / bare


if __name__ == "__main__":
    main()
