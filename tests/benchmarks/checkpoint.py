"""What safety costs: the loop's wait for a save, the gate for numbers, checksums in MB/s.

    python tests/benchmarks/checkpoint.py

All at the demo's size, batch and step, on one thread of XLA. What a save blocks is what ``save``
takes; of that, the copy is what ``jax.device_put`` takes for the same arrays at another time, in
turns. What a save slows the following steps by is the ratio to steps without one. The gate is the
choice between the state before and after an update: two compilations, with and without it, take
turns. Ratios are of medians, by the clock on the wall and by the processor's time, which alone
means something on a machine with other work: of the loop's own thread for what blocks, of the
whole process for steps.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "1"

import jax
import numpy as np

from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax import processes
from uta_jax import step as steps
from uta_jax.checkpoint import Checkpoints, manifest, store
from uta_jax.config_files import read_config
from uta_jax.interop.teacher import load_clip, read_spec

ROOT = Path(__file__).parents[2]
ROUNDS, STEPS = 12, 3  # saves; steps after each
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "thread": time.thread_time}


class Demo:
    """The demo's update on made-up images."""

    def __init__(self):
        config = read_config(str(ROOT / "configs" / "demo.py"), [])
        self.recipe = configs.make_recipe(config, read_spec(config.teacher.path), 30_000)
        self.mesh = meshes.make_mesh(devices=jax.devices()[:1])
        vision = load_clip(config.teacher.path).params["vision"]
        self.frozen = meshes.place(self.mesh, {"vision": vision})
        size = self.recipe.task.student.image_size
        shape = (config.data.batch_size, size, size, 3)
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.batch = jax.device_put({"image": image}, meshes.batch_sharding(self.mesh))
        self.state = steps.init_state(self.recipe, self.mesh)
        self.update = self.compiled()

    def compiled(self):
        step = steps.compile_step(self.recipe, self.mesh, self.frozen)
        return step.lower(self.state, self.frozen, self.batch).compile()

    def some_steps(self, update=None):
        for _ in range(STEPS):
            self.state, _ = (update or self.update)(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)


def timed(found: dict, name: str, run) -> None:
    """Note under ``name`` what ``run`` took, by each clock, in ms."""
    before = {clock: now() for clock, now in CLOCKS.items()}
    run()
    for clock, now in CLOCKS.items():
        found.setdefault((name, clock), []).append(1e3 * (now() - before[clock]))


def saves(demo: Demo, base: Path) -> None:
    """What blocks, and what is slower, beside a save."""
    found, checkpoints = {}, Checkpoints(base, keep=1)
    checkpoints.open(demo.state)
    for _ in range(ROUNDS + 1):
        timed(found, "alone", demo.some_steps)
        timed(found, "copy", lambda: jax.block_until_ready(store.to_host(arrays(demo.state))))
        timed(found, "save", lambda: checkpoints.save(demo.state, {}, {}))
        timed(found, "beside", demo.some_steps)
        timed(found, "rest", checkpoints.wait)
    checkpoints.close()
    medians = {key: statistics.median(values[1:]) for key, values in found.items()}
    step = {clock: medians["alone", clock] / STEPS for clock in CLOCKS}
    for clock, of in (("wall", "wall"), ("thread", "cpu")):
        copy, block = medians["copy", clock], medians["save", clock]
        parts = {"a save blocks": block, "the copy alone": copy, "the rest": max(0, block - copy)}
        shares = (f"{name} {ms:.1f} ms = {ms / step[of]:.1%}" for name, ms in parts.items())
        print(f"{clock:6} a step {step[of]:.1f} ms; {'; '.join(shares)}")
    for clock in ("wall", "cpu"):
        slower = medians["beside", clock] / medians["alone", clock] - 1
        print(f"{clock:6} {STEPS} steps beside a save take {slower:+.1%}")


def arrays(state) -> dict:
    return {"params": state.params, "opt": state.opt_state, "ema": state.ema}


def gate(demo: Demo) -> None:
    """The step with the choice of ``step.py`` against the step that always takes the new state."""
    choose, found = steps._choose, {}
    steps._choose = lambda good, new, old: new
    try:
        without = demo.compiled()
    finally:
        steps._choose = choose
    for turn in range(2 * ROUNDS + 1):
        for name in ("with", "without") if turn % 2 else ("without", "with"):
            update = demo.update if name == "with" else without
            timed(found, name, lambda update=update: demo.some_steps(update))
    for clock in ("wall", "cpu"):
        pair = [statistics.median(found[name, clock][1:]) for name in ("with", "without")]
        print(f"{clock:6} the finite gate costs {pair[0] / pair[1] - 1:+.2%} of a step")


def checksums(base: Path) -> None:
    base.mkdir()
    for n in range(8):
        (base / f"{n}").write_bytes(np.random.default_rng(n).bytes(2**26))
    print(f"manifest, with fsync: {manifest.write(base)}")
    bad, cost = manifest.verify(base)
    print(f"verify: {cost}{bad or ''}")


def main() -> None:
    """Print all of it."""
    processes.settle("cpu")
    demo = Demo()
    with jax.set_mesh(demo.mesh), tempfile.TemporaryDirectory() as base:
        saves(demo, Path(base) / "run")
        gate(demo)
        checksums(Path(base) / "files")


if __name__ == "__main__":
    main()
