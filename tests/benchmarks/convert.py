"""What importing and converting costs, as ratios to the file: reading it once, and its size.

    python tests/benchmarks/convert.py [--models clip_b16,uta_b16,uta_g14_336] [--rounds 7]

Weights are random, at full size, in a temporary directory (twice a file's size is needed there).
All times of one table come from one interleaved run; the file is in the page cache, as it is after
a download, and memory has been touched before. ``load_clip`` also takes the sha256 of what it
reads, in a thread beside: where the file is cached, that is most of its time. UTA-B
also goes there and back, every tensor compared. Not part of the test suite.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from uta_jax.interop import translate
from uta_jax.interop.export import export
from uta_jax.interop.files import SafetensorsWriter, open_weights, write_json
from uta_jax.interop.hf_config import hf_configs
from uta_jax.interop.teacher import load_clip
from uta_jax.models.presets import CLIP

MODELS = {"clip_b16": "hf_clip", "uta_b16": "uta", "uta_g14_336": "uta"}
PEAK = """
import json, re, sys, time
from pathlib import Path
import jax
from uta_jax.interop.teacher import convert

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

start, t = most(), time.perf_counter()
convert(sys.argv[1], sys.argv[2])
print(json.dumps({"start": start, "peak": most(), "seconds": time.perf_counter() - t}))
"""


def write_random(folder: Path, fmt: str, spec, seed: int = 0) -> Path:
    """A checkpoint with a block of noise everywhere, written piece by piece."""
    folder.mkdir()
    noise = np.random.default_rng(seed).normal(size=1 << 20).astype(np.float32)
    shapes = translate.their_shapes(fmt, spec)
    extras = {
        name: np.array(extra.make(spec), np.float32)
        for name, extra in translate._extra_names(fmt, spec)
        if extra.make is not None
    }
    path = folder / "model.safetensors"
    with SafetensorsWriter(path, shapes | {k: x.shape for k, x in extras.items()}) as writer:
        for i, (name, shape) in enumerate(shapes.items()):
            size, block = int(np.prod(shape)), np.roll(noise, 7919 * i)
            for start in range(0, size, block.size):
                writer.put(name, start, block[: size - start])
        for name, x in extras.items():
            writer.put(name, 0, x)
        writer.finish()
    if fmt == "hf_clip":
        for name, values in hf_configs(spec).items():
            write_json(folder / name, values)
    return path


def read_in_chunks(path: Path) -> None:
    """The bytes pass through one small buffer: no memory for them."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(path: Path, preset: str, rounds: int) -> dict[str, float]:
    """Median seconds of each way, taken in turns."""
    ways = {
        "read once into memory": lambda: np.fromfile(path, np.uint8),
        "read once, chunk by chunk": lambda: read_in_chunks(path),
        "read once and sha256": lambda: hashlib.sha256(np.fromfile(path, np.uint8)),
        "load_clip": lambda: load_clip(path, preset=preset).params,
        "load_clip, arrays on the device": lambda: jax.block_until_ready(
            jax.device_put(load_clip(path, preset=preset).params)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            made = way()
            if i:  # the first round touches memory for the first time
                seconds[name].append(time.perf_counter() - start)
            del made
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(a: Path, b: Path) -> int:
    """How many tensors of two files there are; SystemExit where one bit differs."""
    first, second = open_weights(a), open_weights(b)
    if first.keys() != second.keys():
        raise SystemExit(f"other names: {sorted(first.keys() ^ second.keys())}")
    for name in first:
        if np.asarray(first[name]).tobytes() != np.asarray(second[name]).tobytes():
            raise SystemExit(f"{name} differs")
    return len(first)


def benchmark(preset: str, folder: Path, rounds: int) -> None:
    """Print the ratios of one model."""
    fmt, spec = MODELS[preset], CLIP[preset]
    path = write_random(folder / preset, fmt, spec)
    size = path.stat().st_size
    print(f"{preset} ({fmt}), {size / 1e9:.3f} GB")
    if preset != "uta_g14_336":
        times = timed(path, preset, rounds)
        once, hashed = times["read once into memory"], times["read once and sha256"]
        for name, seconds in times.items():
            print(
                f"  {name:34} {seconds:7.3f} s  {seconds / once:5.2f} x read, "
                f"{seconds / hashed:5.2f} x read and sha256"
            )
    command = [sys.executable, "-c", PEAK, str(path), str(folder / "ours")]
    root = Path(__file__).parents[2]
    found = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)
    print(f"  peak memory of convert: {found['peak'] / 1e9:.3f} GB, {found['peak'] / size:.2f} x")
    print(f"    ({found['start'] / 1e9:.3f} GB before it starts; {found['seconds']:.1f} s)")
    if preset == "uta_b16":
        clip = load_clip(folder / "ours")
        export(clip.params, clip.spec, "uta", folder / "back", {})
        print(
            f"  there and back: {compare(path, folder / 'back' / 'uta.safetensors')} tensors equal"
        )


def main() -> None:
    """One table a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="clip_b16,uta_b16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for preset in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            benchmark(preset, Path(folder), args.rounds)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
