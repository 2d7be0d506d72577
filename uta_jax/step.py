"""One update. Read this file first.

``train_step`` is the whole method: draw a mask, run teacher and student, take the gradient of the
objective, update. Everything around it (``train.py``) only feeds it and watches.
"""

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from uta_jax import masking
from uta_jax import mesh as meshes
from uta_jax.objectives import OBJECTIVES, Task
from uta_jax.optimizer import AdamW, make_optimizer, schedule, update_ema


@flax.struct.dataclass
class TrainState:
    """All that an update changes. The teacher is not among it."""

    step: Array  # int32 scalar: updates done
    params: dict  # fp32
    opt_state: optax.OptState
    ema: dict  # fp32, like params; {} where no average is kept


@dataclass(frozen=True)
class Recipe:
    """The static half of a step: what to minimise and how. Hashable: it can key a compilation."""

    task: Task
    optim: AdamW
    ema_decay: float = 0.0  # 0: keep no average
    seed: int = 0
    accumulate: int = 1  # parts of the batch that are computed one after the other


def train_step(
    state: TrainState, frozen: dict, batch: dict, *, recipe: Recipe
) -> tuple[TrainState, dict[str, Array]]:
    """Pure: the next state and the fp32 scalar metrics of this update.

    ``batch``: global arrays, ``image`` uint8 [b, h, w, 3] and what else the objective reads.
    Randomness comes from (seed, step) alone, so a resumed run draws what the uninterrupted one
    would have drawn.

    Where the loss or the gradient's norm is not finite, parameters, moments and average stay as
    they are and the metric ``bad_step`` is 1. Step, schedule and data go on all the same: batch,
    mask and rate of every update are functions of its number alone.
    """
    rng = step_key(recipe.seed, state.step)
    objective = OBJECTIVES[recipe.task.objective]
    loss, metrics, grads = _gradient(state.params, frozen, batch, rng, recipe)
    updates, opt_state = make_optimizer(recipe.optim).update(grads, state.opt_state, state.params)
    params = objective.bound(optax.apply_updates(state.params, updates))
    ema = update_ema(state.ema, params, recipe.ema_decay) if recipe.ema_decay else state.ema
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state, ema = _choose(
        good, (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    )
    metrics |= {f"grad_norm/{name}": x for name, x in group_norms(grads).items()}
    metrics |= {
        "loss": loss,
        "grad_norm": norm,
        "bad_step": 1.0 - good,
        "param_norm": optax.tree.norm(params),
        "lr": schedule(recipe.optim)(state.step),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _gradient(params: dict, frozen: dict, batch: dict, rng: Array, recipe: Recipe) -> tuple:
    """(loss, metrics, gradient) of the batch, computed in ``recipe.accumulate`` parts.

    Part i has the examples i, i + parts, ...: each device goes on with those it has. All parts are
    of one size, masks keep the same number of patches of every image, and the masks are those of
    the whole batch: the means of the parts' losses and gradients are those of the batch.
    """
    parts = recipe.accumulate
    compute = jax.value_and_grad(OBJECTIVES[recipe.task.objective].loss, has_aux=True)
    if parts == 1:
        (loss, metrics), grads = compute(params, frozen, batch, rng, recipe.task)
        return loss, metrics, grads

    def add(total, part):
        number, rows = part
        share = masking.Share(rng, number, parts)
        (loss, metrics), grads = compute(params, frozen, rows, share, recipe.task)
        grads = meshes.constrain(jax.tree.map(jnp.add, total, grads))
        return grads, metrics | {"loss": loss}

    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = meshes.constrain(jax.tree.map(jnp.zeros_like, params))
    total, metrics = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    grads = jax.tree.map(lambda x: x / parts, total)
    metrics = {name: x_p.mean() for name, x_p in metrics.items()}
    return metrics.pop("loss"), metrics, grads


def _choose(good: Array, new, old):
    """``new`` where ``good``, else ``old``; counts (integers) are always those of ``new``.

    Selected within the update's own loops over memory: it reads the old values anyway.
    """
    return jax.tree.map(
        lambda n, o: jnp.where(good, n, o) if jnp.issubdtype(n.dtype, jnp.floating) else n, new, old
    )


def group_norms(grads: dict) -> dict[str, Array]:
    """Norms by group of parameters: ``vision/blocks/attn``, ``vision/head``, ``logit_scale`` ..."""
    groups: dict[str, list] = {}
    for path, grad in jax.tree.leaves_with_path(grads):
        parts = meshes.path_name(path).split("/")
        groups.setdefault("/".join(parts[: min(3, len(parts) - 1)] or parts), []).append(grad)
    return {name: optax.tree.norm(leaves) for name, leaves in groups.items()}


def step_key(seed: int, step: Array | int) -> Array:
    """The key of an update's randomness; ``step`` counts the updates before it."""
    return jax.random.fold_in(jax.random.key(seed), step)


def init_state(recipe: Recipe, mesh: Mesh) -> TrainState:
    """A fresh state, created in its final layout.

    The shardings are given explicitly: left to itself, ``jit`` replicates the optimizer's moments.
    """
    return jax.jit(partial(_fresh_state, recipe), out_shardings=state_shardings(recipe, mesh))()


def state_shapes(recipe: Recipe) -> TrainState:
    """The state as ShapeDtypeStructs; computes nothing."""
    return jax.eval_shape(partial(_fresh_state, recipe))


def state_shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """The state's layout on ``mesh``."""
    shapes = state_shapes(recipe)
    layout = meshes.shardings(mesh, shapes.replace(step={}))
    return layout.replace(step=meshes.replicated(mesh))


def param_shapes(task: Task) -> dict:
    """The parameters that ``task`` trains, as ShapeDtypeStructs."""
    init = OBJECTIVES[task.objective].init
    return jax.eval_shape(lambda: init(jax.random.key(0), task))


def _fresh_state(recipe: Recipe) -> TrainState:
    key = step_key(recipe.seed, 2**32 - 1)  # no step has this number
    params = OBJECTIVES[recipe.task.objective].init(key, recipe.task)
    ema = params if recipe.ema_decay else {}
    return TrainState(jnp.int32(0), params, make_optimizer(recipe.optim).init(params), ema)


# Platform -> options of its compiler. On TPU, loops may use 32 MiB of on-chip memory instead of 16:
# fewer and larger pieces; by the compiler's own estimate 2 % fewer cycles of a UTA-B/16 step.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_scoped_vmem_limit_kib": "32768"}}


def compile_step(recipe: Recipe, mesh: Mesh, frozen: dict):
    """``train_step`` jitted for ``mesh``: (state, frozen, batch) -> (state, metrics).

    ``state`` is donated: its buffers become those of the next one.
    """
    state = state_shardings(recipe, mesh)
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        partial(train_step, recipe=recipe),
        compiler_options=COMPILER_OPTIONS.get(platform),
        in_shardings=(state, meshes.shardings(mesh, frozen), meshes.batch_sharding(mesh)),
        out_shardings=(state, meshes.replicated(mesh)),
        donate_argnums=0,
    )
