"""What sharding costs: one step on 1 to 8 devices, made of the same CPU, at the same total work.

    python tests/benchmarks/scaling.py [--batch_size 64] [--rounds 5] [--json FILE]

Fake devices share the cores, so nothing gets faster with more of them: stated is images/s of the
same global batch against one device, where 1 would be sharding for nothing. It holds the copies
and meetings of collectives among threads of one machine; nothing of a real interconnect. ``data``
replicates the parameters, ``fsdp`` shards them. One process, meshes measured in turns.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"  # a device that waits in a collective holds a thread

import jax
import numpy as np

from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax import processes
from uta_jax.config_files import read_config
from uta_jax.interop.teacher import load_clip
from uta_jax.step import compile_step, init_state

ROOT = Path(__file__).parents[2]
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4))


class Sharded:
    """The demo's step on a mesh of the first devices."""

    def __init__(self, recipe, frozen: dict, shape: tuple[int, int]):
        devices = jax.devices()[: shape[0] * shape[1]]
        self.mesh = meshes.make_mesh(*shape, devices=devices)
        with jax.set_mesh(self.mesh):
            self.frozen, self.state = meshes.place(self.mesh, frozen), init_state(recipe, self.mesh)
            self._update = compile_step(recipe, self.mesh, self.frozen)

    def __call__(self, image_bhwc: np.ndarray) -> float:
        """Seconds of one update."""
        with jax.set_mesh(self.mesh):
            batch = jax.device_put({"image": image_bhwc}, meshes.batch_sharding(self.mesh))
            start = time.perf_counter()
            self.state, values = self._update(self.state, self.frozen, batch)
            jax.block_until_ready(values)
            return time.perf_counter() - start


def main() -> None:
    """One line a mesh."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images over all devices")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", help="write the figures to this file, too")
    args = parser.parse_args()
    processes.settle()
    config = read_config(
        str(ROOT / "configs/demo.py"), [f"--config.data.batch_size={args.batch_size}"]
    )
    teacher = load_clip(config.teacher.path)
    recipe = configs.make_recipe(config, teacher.spec, 30_000, devices=8)
    frozen = {"vision": teacher.params["vision"]}
    side = recipe.task.student.image_size
    shape = (args.batch_size, side, side, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    steps = {shape: Sharded(recipe, frozen, shape) for shape in MESHES}
    spent: dict[tuple, list[float]] = {shape: [] for shape in MESHES}
    for i in range(args.rounds + 1):
        for shape, step in steps.items():
            seconds = step(image)
            if i:  # the first compiles
                spent[shape].append(seconds)
    rows = []
    for (data, fsdp), times in spent.items():
        ratios = sorted(one / t for one, t in zip(spent[1, 1], times, strict=True))
        rows.append(
            {
                "devices": data * fsdp, "data": data, "fsdp": fsdp,
                "of_one_device": round(statistics.median(ratios), 3),
                "least": round(ratios[0], 3), "most": round(ratios[-1], 3),
                "ms_median": round(1000 * statistics.median(times), 1),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
