"""The train step compiled for hardware that is not here: does it fit, how fast, what does it cost.

The TPU compiler runs on any CPU (package ``libtpu``, in the ``tpu`` extra). Memory is what it
allocates. Time is its own estimate of cycles, summed over the loops at the chip's clock: a model,
good for comparing choices, and not a stopwatch.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uta_jax import UserError, hlo, quiet_tpu_library
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.interop.files import write_json
from uta_jax.interop.teacher import read_spec
from uta_jax.models.presets import CLIP, ClipSpec, TextSpec, VitSpec
from uta_jax.models.vit import init_vit
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import Recipe, compile_step, state_shapes, state_shardings


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip, from the maker's data sheets; the clock follows from the matrix units."""

    flops: float  # bf16, per second
    bandwidth: float  # bytes of HBM per second
    memory: float  # bytes of HBM
    clock: float  # cycles per second


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 1.503e9),
    "v5p": Chip(459e12, 2765e9, 95e9, 1.75e9),
    "v6e": Chip(918e12, 1640e9, 32e9, 1.75e9),
}
EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8, cpu:8"


@dataclass(frozen=True)
class Plan:
    """The figures of one compiled step; bytes and FLOPs are per chip unless the name says else."""

    topology: str
    chips: int
    batch_per_chip: int
    fsdp: int
    remat: str
    parameters: int  # that train
    teacher_parameters: int
    params_bytes: int
    moments_bytes: int
    ema_bytes: int
    teacher_bytes: int
    activations_bytes: int  # the peak less all that is there before the step
    peak_bytes: int
    largest_batch_per_chip: int  # estimated from the peak; 0: not known
    student_flops_per_image: float  # by formula, forward and backward, without recomputation
    teacher_flops_per_image: float
    collectives: Mapping[str, int]  # bytes per step
    cycles: int
    step_seconds: float  # by the compiler's cycles; 0: it gives none
    roofline_seconds: float  # FLOPs of the formula at the peak
    images_per_second_per_chip: float
    mfu: float  # roofline_seconds / step_seconds
    hours: float  # for the recipe's steps
    money: float  # hours x chips x price
    compile_seconds: float


def plan(
    recipes: Mapping[str, ConfigDict],
    topology: str,
    batch_per_chip: int = 0,
    price: float = 0.0,
    examples: int = 14_197_122,
    json_file: str | Path = "",
) -> list[Plan]:
    """Compile the step of each recipe for ``topology`` and print what the compiler says.

    Args:
      recipes: by what tells them apart ("" where there is one); those that do not fit are named
        below the table of those that do.
      topology: kind and shape of a slice, as "v5e:16x16"; or "cpu:N".
      batch_per_chip: images; 0 takes ``config.data.batch_size`` over all chips, -1 searches the
        most that fit.
      price: per chip and hour, in any currency.
      examples: length of the training set, for recipes given in epochs (default: ImageNet-21k).

    Raises UserError for an unknown topology, what does not divide, or where no step fits.
    """
    devices = topology_devices(topology)

    def compiled(config: ConfigDict, per_chip: int) -> Plan:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.data.batch_size = per_chip * len(devices) or config.data.batch_size
        recipe = configs.make_recipe(config, _teacher_spec(config), examples, len(devices))
        mesh = meshes.make_mesh(**config.mesh, devices=devices)
        return compile_plan(recipe, mesh, topology, config.data.batch_size, price)

    plans, refused = [], []
    for label, config in recipes.items():
        try:
            if batch_per_chip < 0:
                plans.append(largest_that_fits(partial(compiled, config)))
            else:
                plans.append(compiled(config, batch_per_chip))
        except DoesNotFit as error:
            refused.append(f"{label}: {error}" if label else str(error))
    if not plans:
        raise DoesNotFit("; ".join(refused))
    print("\n".join([table(plans), *refused]))
    if json_file:
        figures = [asdict(each) for each in plans]
        write_json(Path(json_file), figures if len(recipes) > 1 else figures[0])
    return plans


class DoesNotFit(UserError):
    """The step needs more memory than a chip has."""


def largest_that_fits(compiled: Callable[[int], Plan], probes: int = 5) -> Plan:
    """The plan with the largest batch per chip, a multiple of 8, that ``compiled`` accepts.

    Memory is nearly linear in the batch, so each probe aims at what the last one leaves free.
    Raises DoesNotFit where not even 8 images fit.
    """
    best, too_many = compiled(8), 2**30
    for _ in range(probes):
        aim = min(best.largest_batch_per_chip // 8 * 8, too_many - 8)
        if aim <= best.batch_per_chip:
            break
        try:
            best = compiled(aim)
        except DoesNotFit:
            too_many = aim
            best = replace(best, largest_batch_per_chip=(best.batch_per_chip + aim) // 2)
    return best


def topology_devices(topology: str) -> list:
    """The devices of a slice that need not exist."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape):
        if len(jax.devices("cpu")) < int(shape):
            raise UserError(
                f"--topology={topology}: this process has {len(jax.devices('cpu'))} CPU devices, "
                "as XLA_FLAGS says: unset it, or plan for fewer"
            )
        return jax.devices("cpu")[: int(shape)]
    if kind not in CHIPS or not shape:
        raise UserError(
            f"--topology={topology}: not known; give a kind of {', '.join(CHIPS)} or cpu and a "
            f"shape, such as {EXAMPLES}"
        )
    from jax.experimental import topologies

    # It asks the metadata server of a TPU machine, and locks the library against a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    quiet_tpu_library()
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # an untyped error of the plugin's
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={topology}: the TPU compiler refuses it ({reason}); known shapes are such "
            f"as {EXAMPLES}; the compiler itself is `pip install libtpu`"
        ) from None


def _teacher_spec(config: ConfigDict) -> ClipSpec | None:
    """The teacher's architecture: of the checkpoint, or of a preset where none is at hand."""
    if not OBJECTIVES[config.objective].needs_teacher:
        return None
    name = config.teacher.path.removeprefix("preset:")
    if config.teacher.path.startswith("preset:"):
        if name not in CLIP:
            raise UserError(f"config.teacher.path=preset:{name}: there are {', '.join(CLIP)}")
        return CLIP[name]
    with configs.blame("config.teacher.path (or preset:NAME, to plan without a checkpoint)"):
        return read_spec(config.teacher.path)


def compile_plan(recipe: Recipe, mesh: Mesh, topology: str, batch: int, price: float) -> Plan:
    """Compile ``train_step`` for ``mesh`` and read its figures; ``batch`` is global."""
    state = _placed(state_shapes(recipe), state_shardings(recipe, mesh))
    frozen, inputs = _frozen(recipe, mesh), _inputs(recipe, mesh, batch)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = compile_step(recipe, mesh, frozen).lower(state, frozen, inputs)
        compiled = _compile(lowered, recipe, mesh, topology)
    seconds = time.perf_counter() - start
    program, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
    parts = [_bytes(x) for x in (state.params, state.opt_state, state.ema, frozen)]
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = max(getattr(memory, "peak_memory_in_bytes", 0), held)
    activations = peak - sum(parts)
    student, teacher = flops_per_image(recipe)
    chip, chips = CHIPS.get(topology.partition(":")[0]), mesh.devices.size
    per_chip = batch // chips
    step = program.cycles / chip.clock if chip else 0.0
    roofline = per_chip * (student + teacher) / chip.flops if chip else 0.0
    largest = per_chip * (chip.memory - sum(parts)) / activations if chip else 0
    hours = step * recipe.optim.total_steps / 3600
    return Plan(
        topology, chips, per_chip, mesh.shape["fsdp"], recipe.task.remat,
        _count(state.params), _count(frozen), *parts, activations, peak, max(0, int(largest)),
        student, teacher, program.collectives, program.cycles, step, roofline,
        images_per_second_per_chip=per_chip / step if step else 0.0,
        mfu=roofline / step if step else 0.0,
        hours=hours,
        money=hours * chips * price,
        compile_seconds=seconds,
    )  # fmt: skip


def _frozen(recipe: Recipe, mesh: Mesh) -> dict:
    """The teacher's vision tower as shapes, in the layout that a run gives it."""
    teacher, dtype = recipe.task.teacher, jnp.dtype(recipe.task.teacher_dtype)
    if not teacher:
        return {}
    shapes = jax.eval_shape(lambda: {"vision": init_vit(teacher.vision, jax.random.key(0))})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return _placed(shapes, meshes.shardings(mesh, shapes))


def _inputs(recipe: Recipe, mesh: Mesh, batch: int) -> dict:
    """A batch as shapes."""
    size, text = recipe.task.student.image_size, recipe.task.text
    shapes = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)}
    if text:
        shapes["text"] = jax.ShapeDtypeStruct((batch, text.context), jnp.int32)
    return _placed(shapes, dict.fromkeys(shapes, meshes.batch_sharding(mesh)))


def _placed(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _bytes(tree) -> int:
    """On one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def flops_per_image(recipe: Recipe) -> tuple[float, float]:
    """(student forward and backward, teacher forward): products of matrices alone, two per MAC."""
    task = recipe.task
    kept = task.mask.keep if OBJECTIVES[task.objective].drops else task.student.tokens
    student = 3 * _tower_flops(task.student, kept, kept + 1)
    if task.text:
        student += 3 * _tower_flops(task.text, task.text.context, 1)
    teacher = task.teacher.vision if task.teacher else None
    return student, _tower_flops(teacher, teacher.tokens, kept + 1) if teacher else 0.0


def _tower_flops(spec: VitSpec | TextSpec, patches: int, projected: int) -> float:
    """One forward pass over ``patches`` tokens (and CLS), of which ``projected`` are projected."""
    vision = isinstance(spec, VitSpec)
    tokens = patches + (vision and spec.cls)
    maps = 3 if spec.act == "swiglu" else 2
    per_token = 4 * spec.width**2 + maps * spec.width * spec.mlp_hidden + 2 * tokens * spec.width
    macs = spec.depth * tokens * per_token + projected * spec.width * spec.out_dim
    if vision:
        macs += patches * 3 * spec.patch_size**2 * spec.width
    return 2.0 * macs


_TOO_MUCH = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


def _compile(lowered, recipe: Recipe, mesh: Mesh, topology: str):
    """Compile; raise DoesNotFit where the TPU compiler finds too little memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_MUCH.search(str(error))
        if not found:
            raise
        used, memory = (float(x) * 2**30 / 1e9 for x in found.groups())
    raise DoesNotFit(
        f"--topology={topology}: the step needs at least {used:.1f} GB of a chip's {memory:.1f}, "
        f"{used - memory:.1f} GB too much: try {_advice(recipe, mesh)}"
    )


def _advice(recipe: Recipe, mesh: Mesh) -> str:
    """What makes a step smaller, of what this one does not do yet."""
    advice = ["--batch-per-chip=max"]
    if mesh.shape["fsdp"] < mesh.devices.size:
        advice.append(f"--config.mesh.fsdp={min(2 * mesh.shape['fsdp'], mesh.devices.size)}")
    if recipe.task.remat != "full":
        advice.append("--config.student.remat=full")
    return " or ".join(advice)


def table(plans: list[Plan]) -> str:
    """One column for each plan."""
    rows = {
        "chips, images per chip": lambda p: f"{p.chips} x {p.batch_per_chip}",
        "fsdp, remat": lambda p: f"{p.fsdp}, {p.remat}",
        "parameters, of the teacher": lambda p: (
            f"{p.parameters / 1e6:.1f} M, {p.teacher_parameters / 1e6:.1f} M"
        ),
        "GB per chip: parameters": lambda p: f"{p.params_bytes / 1e9:.2f}",
        "  moments": lambda p: f"{p.moments_bytes / 1e9:.2f}",
        "  average": lambda p: f"{p.ema_bytes / 1e9:.2f}",
        "  teacher": lambda p: f"{p.teacher_bytes / 1e9:.2f}",
        "  activations": lambda p: f"{p.activations_bytes / 1e9:.2f}",
        "  peak": lambda p: f"{p.peak_bytes / 1e9:.2f}",
        "largest batch per chip (estimate)": lambda p: str(p.largest_batch_per_chip or "-"),
        "GFLOP per image, student": lambda p: f"{p.student_flops_per_image / 1e9:.1f}",
        "GFLOP per image, teacher": lambda p: f"{p.teacher_flops_per_image / 1e9:.1f}",
        "collectives, GB per step": lambda p: ", ".join(
            f"{kind} {size / 1e9:.2f}" for kind, size in p.collectives.items()
        ),
        "step by the compiler's cycles, ms": lambda p: f"{1e3 * p.step_seconds:.1f}",
        "step at peak FLOP/s, ms": lambda p: f"{1e3 * p.roofline_seconds:.1f}",
        "mfu": lambda p: f"{p.mfu:.2f}",
        "images/s per chip": lambda p: f"{p.images_per_second_per_chip:.0f}",
        "hours for the recipe": lambda p: f"{p.hours:.1f}",
        "money": lambda p: f"{p.money:,.0f}" if p.money else "- (give --price)",
        "compiled in, s": lambda p: f"{p.compile_seconds:.0f}",
    }
    width = max(map(len, rows))
    head = " " * width + "".join(f"  {p.topology:>24}" for p in plans)
    body = [
        f"{name:{width}}" + "".join(f"  {show(p):>24}" for p in plans)
        for name, show in rows.items()
    ]
    return "\n".join([head, *body])
