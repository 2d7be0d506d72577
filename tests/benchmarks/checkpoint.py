"""What saving costs: the loop's wait as a share of a step, and checksums in MB/s.

    python tests/benchmarks/checkpoint.py

Two loops of the demo's step at the demo's size take turns in one process: one saves before a step,
the other does not. What a save blocks is what `save` takes; what it slows the following steps by is
the difference of their means.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from uta_jax import mesh as meshes
from uta_jax import step as steps
from uta_jax.checkpoint import Checkpoints, manifest
from uta_jax.config_files import read_config
from uta_jax.interop.teacher import load_clip, read_spec

ROOT = Path(__file__).parents[2]
ROUNDS, STEPS = 12, 3  # saves; steps after each


def main():
    from uta_jax import config as configs

    config = read_config(str(ROOT / "configs" / "demo.py"), [])
    recipe = configs.make_recipe(config, read_spec(config.teacher.path), 30_000)
    mesh = meshes.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as base:
        frozen = meshes.place(mesh, {"vision": load_clip(config.teacher.path).params["vision"]})
        state = steps.init_state(recipe, mesh)
        update = steps.compile_step(recipe, mesh, frozen)
        size = recipe.task.student.image_size
        image = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8)
        batch = jax.device_put({"image": image}, meshes.batch_sharding(mesh))
        checkpoints = Checkpoints(Path(base), keep=1)
        checkpoints.open(state)

        def some_steps(state):
            since = time.perf_counter()
            for _ in range(STEPS):
                state, values = update(state, frozen, batch)
            jax.block_until_ready(values)
            return state, (time.perf_counter() - since) / STEPS

        state, _ = some_steps(state)
        blocked, beside, alone = [], [], []
        for _ in range(ROUNDS):
            jax.block_until_ready(state)
            since = time.perf_counter()
            checkpoints.save(state, {}, {})
            blocked.append(time.perf_counter() - since)
            state, seconds = some_steps(state)
            beside.append(seconds)
            checkpoints.wait()
            state, seconds = some_steps(state)
            alone.append(seconds)
        step, block = statistics.median(alone), statistics.median(blocked[1:])
        print(f"a step alone        {1e3 * step:8.1f} ms")
        print(f"save blocks         {1e3 * block:8.1f} ms = {block / step:.1%} of a step")
        slower = statistics.median(beside) / step - 1
        print(f"steps beside a save {1e3 * statistics.median(beside):8.1f} ms = {slower:+.1%}")
        checkpoints.close()
        big = Path(base) / "big"
        big.mkdir()
        for n in range(8):
            (big / f"{n}").write_bytes(np.random.default_rng(n).bytes(2**26))
        print(f"manifest, with fsync: {manifest.write(big)}")
        bad, cost = manifest.verify(big)
        print(f"verify: {cost}{bad or ''}")
        shutil.rmtree(big)


if __name__ == "__main__":
    main()
