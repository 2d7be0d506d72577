"""What a step computes: operations by formula and by XLA's count, and what its products move."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, jaxprs_in_params

from uta_jax.models.presets import TextSpec, VitSpec
from uta_jax.models.vit import init_vit
from uta_jax.objectives import OBJECTIVES, Task, teacher_tokens
from uta_jax.step import Recipe, state_shapes, train_step


def frozen_shapes(task: Task) -> dict:
    """The teacher's vision tower as ShapeDtypeStructs; {} where there is none."""
    if not task.teacher:
        return {}
    shapes = jax.eval_shape(lambda: {"vision": init_vit(task.teacher.vision, jax.random.key(0))})
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, task.teacher_dtype), shapes)


def batch_shapes(task: Task, batch: int) -> dict:
    """A batch as ShapeDtypeStructs."""
    size, text = task.student.image_size, task.text
    shapes = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)}
    if text:
        shapes["text"] = jax.ShapeDtypeStruct((batch, text.context), jnp.int32)
    return shapes


def kept(task: Task) -> int:
    """Patches of an image that the student runs on."""
    return task.mask.keep if OBJECTIVES[task.objective].drops else task.student.tokens


def by_formula(task: Task) -> tuple[float, float]:
    """Per image (student forward and backward, teacher forward): matrix products, two per MAC."""
    student = 3 * _tower(task.student, kept(task), kept(task) + 1)
    if task.text:
        student += 3 * _tower(task.text, task.text.context, 1)
    teacher = task.teacher.vision if task.teacher else None
    return student, _tower(teacher, teacher.tokens, kept(task) + 1) if teacher else 0.0


def _tower(spec: VitSpec | TextSpec, patches: int, projected: int) -> float:
    """One forward pass over ``patches`` tokens (and CLS), of which ``projected`` are projected."""
    vision = isinstance(spec, VitSpec)
    tokens = patches + (vision and spec.cls)
    maps = 3 if spec.act == "swiglu" else 2
    per_token = 4 * spec.width**2 + maps * spec.width * spec.mlp_hidden + 2 * tokens * spec.width
    macs = spec.depth * tokens * per_token + projected * spec.width * spec.out_dim
    if vision:
        macs += patches * 3 * spec.patch_size**2 * spec.width
    return 2.0 * macs


def by_xla(recipe: Recipe, batch: int) -> tuple[float, float]:
    """Per image (student and update, teacher): XLA's count of the step on one device, unoptimised.

    Without remat and with its blocks written out, for XLA counts the body of a loop once. Nothing
    is compiled. In the form that a CPU gets: on TPU the sums of the norms are products, too.
    """
    task = replace(recipe.task, remat="none", unroll=True)
    whole = _lowered(replace(recipe, task=task), batch).cost_analysis()["flops"] / batch
    if not task.teacher:
        return whole, 0.0
    keep = jax.ShapeDtypeStruct((batch, kept(task)), jnp.int32)
    alone = jax.jit(partial(teacher_tokens, task=task)).lower(
        frozen_shapes(task), batch_shapes(task, batch)["image"], keep
    )
    teacher = alone.cost_analysis()["flops"] / batch
    return whole - teacher, teacher


def _lowered(recipe: Recipe, batch: int):
    recipe = replace(recipe, accumulate=1)  # its parts are a loop, whose body XLA counts once
    arguments = frozen_shapes(recipe.task), batch_shapes(recipe.task, batch)
    return jax.jit(partial(train_step, recipe=recipe)).lower(state_shapes(recipe), *arguments)


def bytes_of_products(recipe: Recipe, batch: int) -> int:
    """What the matrix products of a step on one device read and write, as if all else were fused.

    What memory must move where every product is a kernel of its own; ``batch`` images, remat as
    the recipe has it. Nothing is compiled.
    """
    arguments = frozen_shapes(recipe.task), batch_shapes(recipe.task, batch)
    step = partial(train_step, recipe=recipe)
    return moved_by_products(jax.make_jaxpr(step)(state_shapes(recipe), *arguments).jaxpr)


def moved_by_products(jaxpr) -> int:
    """Bytes of the operands and results of the products of a jaxpr."""
    return sum(
        times * sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars + eqn.outvars)
        for eqn, times in products(jaxpr)
    )


def products(jaxpr) -> list[tuple[JaxprEqn, int]]:
    """Products and convolutions of a jaxpr and how often each runs; of branches, the fewest."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((eqn, 1))
        elif inner := [products(each) for each in jaxprs_in_params(eqn.params)]:
            # The TPU's branch of a norm has products that others do without.
            inner = [min(inner, key=len)] if eqn.primitive.name == "cond" else inner
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            found += [(each, times * n) for each, n in itertools.chain(*inner)]
    return found
