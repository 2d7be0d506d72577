"""A state of a few thousand numbers, saved in no time; scripts of tests can import it, too."""

import functools
from dataclasses import replace

import jax

from uta_jax import masking, mesh
from uta_jax.checkpoint import Checkpoints
from uta_jax.models import presets
from uta_jax.objectives import Task
from uta_jax.optimizer import AdamW
from uta_jax.step import Recipe, init_state

VISION = replace(
    presets.VIT["tiny_clip"], width=8, heads=1, mlp_hidden=16, depth=1, out_dim=8, head_proj=True
)
CLIP = replace(presets.CLIP["tiny_clip"], vision=VISION)
TASK = Task("uta", VISION, CLIP.mean, CLIP.std, teacher=CLIP, mask=masking.Mask("random", 32))
RECIPE = Recipe(TASK, AdamW(1e-3, 20, 4), ema_decay=0.9)
DATA = {"examples_seen": 16, "fingerprint": "of nothing"}


def on(data: int, fsdp: int) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    return mesh.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


@functools.cache
def _first(devices: jax.sharding.Mesh, recipe: Recipe):
    with jax.set_mesh(devices):
        return init_state(recipe, devices)


def state_at(step: int, devices: jax.sharding.Mesh, recipe: Recipe = RECIPE):
    """Every array differs from step to step, and from the others."""
    leaves, tree = jax.tree.flatten(_first(devices, recipe))
    new = [leaf + leaf.dtype.type(step * (n + 1)) for n, leaf in enumerate(leaves)]
    new = [jax.device_put(x, leaf.sharding) for x, leaf in zip(new, leaves, strict=True)]
    return jax.tree.unflatten(tree, new).replace(
        step=jax.device_put(jax.numpy.int32(step), mesh.replicated(devices))
    )


def save(checkpoints: Checkpoints, *steps: int) -> dict:
    """Save the states of these steps, one after the other; returns them on the host."""
    states = {step: state_at(step, on(1, 1)) for step in steps}
    for state in states.values():
        checkpoints.save(state, DATA, {"teacher": {"sha256": "00"}})
    checkpoints.wait()
    return {step: mesh.fetch(state) for step, state in states.items()}
