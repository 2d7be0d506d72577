"""Our CPU train step against the same UTA step in plain PyTorch (``torch_uta.py``), as ratios.

    python tests/benchmarks/step.py [--sizes demo,demo_clip,vit_b16] [--dtypes float32,bfloat16]
        [--threads 1] [--rounds 5] [--seconds 3] [--json FILE]

``demo``: configs/demo.py with a student of the UTA architecture; ``demo_clip``: as it stands;
``vit_b16``: UTA-B/16 and a CLIP-B/16 teacher with random weights, 4 images.

Before anything is timed, both have the same weights and the same mask and must agree in loss and
gradient; the FLOPs are counted by our formula and by PyTorch. Then they take turns in one process,
in alternating order, each with ``--threads``. ``cpu`` rates count the processor time of the whole
process, ``wall`` rates the time that passes: on a machine with other work only the first with one
thread means anything, for the threads of PyTorch wait for each other, and one that has lost its
core stops all.

Not the same: PyTorch embeds all patches and then drops, as its libraries do, ours drops first (2 %
of the FLOPs at most); its masks are not sorted; its rotary positions do not rotate by products;
ours computes the norm of the parameters, too. Its AdamW is the fused one. The C allocator keeps
freed memory for both (``processes.settle``); PyTorch by itself would not.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"
# Of XLA's pool, which takes it when it starts.
os.environ["NPROC"] = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "1"

import jax
import numpy as np
import torch
from torch_uta import TorchStep, count_flops

from uta_jax import config as configs
from uta_jax import flops, processes
from uta_jax import mesh as meshes
from uta_jax.config_files import read_config
from uta_jax.interop.teacher import load_clip
from uta_jax.models.presets import CLIP
from uta_jax.models.vit import init_vit
from uta_jax.objectives import alignment_loss, student_input, teacher_tokens
from uta_jax.step import Recipe, compile_step, init_state

ROOT = Path(__file__).parents[2]
# Name -> (overrides of configs/demo.py, preset of a teacher with random weights or "").
SIZES = {
    "demo": (("--config.student.preset=uta_tiny",), ""),
    "demo_clip": ((), ""),
    "vit_b16": (("--config.student.preset=uta_b16", "--config.data.batch_size=4"), "clip_b16"),
}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def make_recipe(size: str, dtype: str) -> tuple[Recipe, int]:
    """(recipe, images a step)."""
    overrides, preset = SIZES[size]
    dtypes = (f"--config.student.dtype={dtype}", f"--config.teacher.dtype={dtype}")
    config = read_config(str(ROOT / "configs/demo.py"), [*overrides, *dtypes])
    spec = CLIP[preset] if preset else load_clip(config.teacher.path).spec
    return configs.make_recipe(config, spec, 30_000, devices=1), config.data.batch_size


def teacher_params(size: str, recipe: Recipe) -> dict:
    """The teacher's vision tower, fp32 on the host."""
    if not SIZES[size][1]:
        return load_clip("asset:tiny_clip").params["vision"]
    make = jax.jit(lambda: init_vit(recipe.task.teacher.vision, jax.random.key(9)))
    return meshes.fetch(make())


class OurStep:
    """One update, as the loop runs it: ``step(image_uint8_bhwc)`` -> metrics as floats."""

    def __init__(self, recipe: Recipe, frozen: dict):
        self.mesh = meshes.make_mesh(devices=jax.devices()[:1])
        self.recipe = recipe
        with jax.set_mesh(self.mesh):
            dtype = jax.numpy.dtype(recipe.task.teacher_dtype)
            self.frozen = meshes.place(self.mesh, jax.tree.map(lambda x: x.astype(dtype), frozen))
            self.state = init_state(recipe, self.mesh)
            self._update = compile_step(recipe, self.mesh, self.frozen)

    def __call__(self, image_bhwc: np.ndarray) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            batch = jax.device_put({"image": image_bhwc}, meshes.batch_sharding(self.mesh))
            self.state, values = self._update(self.state, self.frozen, batch)
            return {name: float(x) for name, x in jax.device_get(values).items()}

    def loss_and_norm(self, image_bhwc: np.ndarray, keep_bk: np.ndarray) -> tuple[float, float]:
        """Loss and norm of the gradient for a given mask."""
        task = self.recipe.task

        def loss(params, frozen, image_bhwc, keep_bk):
            target_bke = teacher_tokens(frozen, image_bhwc, keep_bk, task)
            inputs = student_input(image_bhwc, task)
            student_bke = task.vit().apply({"params": params["vision"]}, inputs, keep_bk)
            return alignment_loss(student_bke, target_bke, task.cls_weight)[0]

        inputs = (self.state.params, self.frozen, image_bhwc, keep_bk)
        value, grads = jax.jit(jax.value_and_grad(loss))(*inputs)
        return float(value), float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads))))


def check_equal(ours: OurStep, theirs: TorchStep, image_bhwc: np.ndarray) -> dict[str, float]:
    """How far they are apart at the same weights and mask; SystemExit where that is too far."""
    loss, _, norm = (x.detach() for x in theirs.gradient(image_bhwc))
    keep_bk = theirs.drop.kept.numpy().astype(np.int32)
    our_loss, our_norm = ours.loss_and_norm(image_bhwc, keep_bk)
    found = {"loss": abs(our_loss - float(loss)), "grad_norm": abs(our_norm / float(norm) - 1)}
    if max(found.values()) > (1e-4 if ours.recipe.task.dtype == "float32" else 2e-2):
        raise SystemExit(f"the steps differ: {found}")
    return found


def rates(
    steps: dict[str, Callable], images: list[np.ndarray], rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Clock -> whose -> images/s of each round, taken in turns."""
    found: dict = {clock: {name: [] for name in steps} for clock in CLOCKS}
    for step in steps.values():
        step(images[0])
    for i in range(rounds):
        for name in list(steps) if i % 2 else list(reversed(steps)):
            time.sleep(0.2)  # the other's threads stop spinning
            starts, count = {clock: now() for clock, now in CLOCKS.items()}, 0
            while not count or time.perf_counter() - starts["wall"] < seconds:
                steps[name](images[count % len(images)])
                count += 1
            for clock, now in CLOCKS.items():
                found[clock][name].append(count * len(images[0]) / (now() - starts[clock]))
    return found


def summary(found: dict[str, list[float]]) -> dict:
    """Rates and ratios by one clock; three numbers are the least, the median and the most."""
    pairs = [a / b for a, b in zip(found["ours"], found["torch"], strict=True)]
    medians = {name: statistics.median(x) for name, x in found.items()}
    return {
        "ratio_of_medians": round(medians["ours"] / medians["torch"], 3),
        "ratio_by_round": _spread(pairs),
        "images_per_s": {name: _spread(x) for name, x in found.items()},
    }


def _spread(values: list[float]) -> list[float]:
    return [round(x, 3) for x in (min(values), statistics.median(values), max(values))]


def benchmark(size: str, dtype: str, rounds: int, seconds: float) -> dict:
    """The figures of one size in one precision."""
    recipe, batch = make_recipe(size, dtype)
    frozen = {"vision": teacher_params(size, recipe)}
    ours = OurStep(recipe, frozen)
    theirs = TorchStep(recipe, meshes.fetch(ours.state.params), frozen)
    side = recipe.task.student.image_size
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8) for _ in range(4)]
    found = {
        "size": size,
        "dtype": dtype,
        "batch": batch,
        "threads": int(os.environ["NPROC"]),
        "difference": check_equal(ours, theirs, images[0]),
        "gflop_per_image": {
            "formula": round(sum(flops.by_formula(recipe.task)) / 1e9, 4),
            "torch": round(count_flops(theirs, images[0]) / batch / 1e9, 4),
        },
    }
    by_clock = rates({"ours": ours, "torch": theirs}, images, rounds, seconds)
    return found | {clock: summary(x) for clock, x in by_clock.items()}


def main() -> None:
    """One line for each size and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least")
    parser.add_argument("--json", default="", help="write the figures to this file, too")
    args = parser.parse_args()
    processes.settle()
    torch.set_num_threads(args.threads)
    results = []
    for size in args.sizes.split(","):
        for dtype in args.dtypes.split(","):
            results.append(benchmark(size, dtype, args.rounds, args.seconds))
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
