"""A tiny run on any mesh, to compare: every trait that the layout table has a row for.

As a script, one of several processes of four devices: ``python tests/alike.py OUT.npz``; they train
together, and the first writes the losses and the parameters.
"""

import sys
from dataclasses import replace

import jax
import numpy as np

from uta_jax import masking, mesh, processes
from uta_jax.models import presets
from uta_jax.models.vit import init_vit
from uta_jax.objectives import Task
from uta_jax.optimizer import AdamW
from uta_jax.step import Recipe, TrainState, compile_step, state_shapes

# Few numbers: the compiler would take longer than all updates.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STEPS, BATCH = 20, 16
SMALL = {"image_size": 32, "patch_size": 8, "depth": 2, "heads": 2, "out_dim": 24}
STUDENT = replace(presets.VIT["uta_tiny"], width=32, mlp_hidden=56, **SMALL)
TEACHER = replace(presets.VIT["tiny_clip"], width=40, mlp_hidden=72, **SMALL)
CLIP = replace(presets.CLIP["tiny_clip"], vision=TEACHER)
TASK = Task("uta", STUDENT, CLIP.mean, CLIP.std, teacher=CLIP, mask=masking.Mask("random", 9))
RECIPE = Recipe(TASK, AdamW(2e-3, STEPS, 4, clip_norm=3.0), ema_decay=0.9)


def numbers(tree, seed: int):
    """Random parameters on the host, in no time: of a norm's scale around one, else around zero."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        centre = float(mesh.path_name(path).endswith("scale"))
        return (centre + 0.15 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def teacher(dtype: str = "float32") -> dict:
    """Its vision tower, on the host."""
    params = numbers(jax.eval_shape(lambda: init_vit(TEACHER, jax.random.key(0))), 1)
    return jax.tree.map(lambda x: x.astype(jax.numpy.dtype(dtype)), params)


def _state(devices: jax.sharding.Mesh, recipe: Recipe) -> TrainState:
    shapes = state_shapes(recipe)
    params = numbers(shapes.params, 2)
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
    placed = mesh.place(devices, {"params": params, "opt_state": moments, "ema": params})
    return TrainState(step=mesh.replicate(devices, np.int32(0)), **placed)


def train(devices: jax.sharding.Mesh, recipe: Recipe = RECIPE, steps: int = STEPS):
    """(losses, state, frozen, the compiled program's text) of ``steps`` updates."""
    rng, share = np.random.default_rng(0), BATCH // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    with jax.set_mesh(devices):
        frozen = mesh.place(devices, {"vision": teacher(recipe.task.teacher_dtype)})
        state, update, losses = _state(devices, recipe), None, []
        for _ in range(steps):
            image = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)[own]
            split = mesh.batch_sharding(devices)
            batch = {"image": jax.make_array_from_process_local_data(split, image)}
            if update is None:
                lowered = compile_step(recipe, devices, frozen).lower(state, frozen, batch)
                update = lowered.compile(QUICK)
            state, metrics = update(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses, state, frozen, update.as_text()


def main() -> None:
    """A process is half of the data axis."""
    with processes.started("cpu"):
        losses, state, *_ = train(mesh.make_mesh(2, 2, 2, dcn_data=2))
        params = mesh.fetch(state.params)
        if jax.process_index() == 0:
            leaves = {f"params/{i}": x for i, x in enumerate(jax.tree.leaves(params))}
            np.savez(sys.argv[1], losses=losses, **leaves)


if __name__ == "__main__":
    main()
