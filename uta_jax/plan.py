"""The train step compiled for hardware that is not here: does it fit, how fast, what does it cost.

The TPU compiler runs on any CPU (package ``libtpu``, in the ``tpu`` extra). Memory is what it
allocates. Time is its own estimate of cycles, summed over the loops at the chip's clock: a model,
good for comparing choices, and not a stopwatch. For GPUs there is no such compiler: memory is then
that of the CPU's, and time a roofline.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uta_jax import UserError, chips, flops, hlo
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.fitting import DoesNotFit, largest_that_fits, what_would_fit
from uta_jax.interop.files import write_json
from uta_jax.interop.teacher import read_spec
from uta_jax.models.presets import CLIP, ClipSpec
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import Recipe, compile_step, state_shapes, state_shardings

CYCLES, ROOFLINE = "compiler's cycles", "roofline"  # where the time of a step comes from


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
    student_xla_flops_per_image: float  # by XLA's count, with the update, without recomputation
    teacher_xla_flops_per_image: float
    collectives: Mapping[str, int]  # bytes per step
    cycles: int
    estimate: str  # where step_seconds is from: CYCLES, ROOFLINE, or "" (there is none)
    step_seconds: float
    peak_flops_seconds: float  # FLOPs of the formula at the peak
    images_per_second_per_chip: float
    mfu: float  # peak_flops_seconds / step_seconds
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
      recipes: by what tells them apart; those that do not fit are named below the table of those
        that do. Of one alone, named "", it is also told what would make it fit.
      topology: kind and shape of a slice, as "v5e:16x16"; "gpu:h100x8"; or "cpu:N".
      batch_per_chip: images; 0 takes ``config.data.batch_size`` over all chips, -1 searches the
        most that fit.
      price: per chip and hour, in any currency.
      examples: length of the training set, for recipes given in epochs (default: ImageNet-21k).

    Raises UserError for an unknown topology, what does not divide, or where no step fits.
    """
    setting = _Setting(topology, chips.devices(topology), examples, price)
    plans, refused = [], []
    for label, config in recipes.items():
        per_chip = batch_per_chip or config.data.batch_size // len(setting.devices)
        try:
            if per_chip < 0:
                plans.append(largest_that_fits(partial(setting.compiled, config)))
            else:
                plans.append(setting.compiled(config, batch_per_chip))
        except DoesNotFit as error:
            refused.append(f"{label or f'--topology={topology}'}: {error}")
            if not label:
                print(f"{refused[-1]}; compiling what may fit ...", flush=True)
                functions = setting.compiled, setting.held
                refused.append(what_would_fit(error, config, max(8, per_chip), *functions))
    if not plans:
        raise UserError("; ".join(refused))
    print("\n".join([table(plans), *refused]))
    if json_file:
        figures = [asdict(each) for each in plans]
        write_json(Path(json_file), figures if len(recipes) > 1 else figures[0])
    return plans


@dataclass(frozen=True)
class _Setting:
    """What all plans of a command share."""

    topology: str
    devices: list
    examples: int
    price: float

    def _recipe(self, config: ConfigDict, per_chip: int) -> tuple[Recipe, Mesh, int]:
        """(recipe, mesh, global batch)."""
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.data.batch_size = per_chip * len(self.devices) or config.data.batch_size
        teacher = _teacher_spec(config)
        recipe = configs.make_recipe(config, teacher, self.examples, len(self.devices))
        mesh = meshes.make_mesh(**config.mesh, devices=self.devices)
        return recipe, mesh, config.data.batch_size

    def compiled(self, config: ConfigDict, per_chip: int) -> Plan:
        """The plan; ``per_chip`` 0: the batch of the configuration. Raises DoesNotFit."""
        recipe, mesh, batch = self._recipe(config, per_chip)
        return compile_plan(recipe, mesh, self.topology, batch, self.price)

    def held(self, config: ConfigDict) -> int:
        """Bytes on a chip before the step, whatever the batch."""
        return sum(held_bytes(_arguments(*self._recipe(config, 8 * config.train.accumulate))))


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
    """Compile ``train_step`` for ``mesh`` and read its figures; ``batch`` is global.

    Raises DoesNotFit.
    """
    arguments, chip = _arguments(recipe, mesh, batch), chips.chip_of(topology)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = _compile(compile_step(recipe, mesh, arguments[1]).lower(*arguments))
    seconds = time.perf_counter() - start
    program, memory = _program(compiled), compiled.memory_analysis()
    peak = _peak_bytes(memory, chip)
    if chip and not chip.clock and peak > chip.memory:  # a TPU's compiler has refused by itself
        raise DoesNotFit(peak, chip.memory)
    parts = held_bytes(arguments)
    activations = peak - sum(parts)
    state, frozen, _ = arguments
    per_chip = batch // mesh.devices.size
    largest = per_chip * (chip.memory - sum(parts)) / activations if chip else 0
    formula, counted = flops.by_formula(recipe.task), flops.by_xla(recipe, per_chip)
    estimate, step = _step_seconds(recipe, chip, program.cycles, per_chip, sum(counted))
    at_peak = per_chip * sum(formula) / chip.flops if chip else 0.0
    hours = step * recipe.optim.total_steps / 3600
    return Plan(
        topology, mesh.devices.size, per_chip, mesh.shape["fsdp"], recipe.task.remat,
        _count(state.params), _count(frozen), *parts, activations, peak, max(0, int(largest)),
        *formula, *counted, program.collectives, program.cycles, estimate, step, at_peak,
        images_per_second_per_chip=per_chip / step if step else 0.0,
        mfu=at_peak / step if step else 0.0,
        hours=hours,
        money=hours * mesh.devices.size * price,
        compile_seconds=seconds,
    )  # fmt: skip


def _peak_bytes(memory, chip: chips.Chip | None) -> int:
    """The most that is held at once, by ``compiled.memory_analysis()``.

    A TPU's compiler tells it, and its temporaries may add up to more than the chip has. Of other
    compilers: the arguments and all temporaries.
    """
    if chip and chip.clock:
        return memory.peak_memory_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _program(compiled) -> hlo.Program:
    """What the program says of itself; nothing where this jaxlib cannot read it.

    A libtpu other than the one that JAX was released with may write instructions that it refuses.
    """
    try:
        return hlo.read(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return hlo.Program(0, {})


def _step_seconds(
    recipe: Recipe, chip: chips.Chip | None, cycles: int, per_chip: int, counted: float
) -> tuple[str, float]:
    """Where the time of a step is from, and the time."""
    if chip is None:
        return "", 0.0
    if chip.clock:
        return CYCLES if cycles else "", cycles / chip.clock
    moved = flops.bytes_of_products(recipe, per_chip)
    return ROOFLINE, max(per_chip * counted / chip.flops, moved / chip.bandwidth)


def _arguments(recipe: Recipe, mesh: Mesh, batch: int) -> tuple:
    """(state, frozen, batch) of a step as shapes, in the layout that a run gives them."""
    state = _placed(state_shapes(recipe), state_shardings(recipe, mesh))
    frozen, inputs = flops.frozen_shapes(recipe.task), flops.batch_shapes(recipe.task, batch)
    frozen = _placed(frozen, meshes.shardings(mesh, frozen))
    return state, frozen, _placed(inputs, dict.fromkeys(inputs, meshes.batch_sharding(mesh)))


def held_bytes(arguments: tuple) -> tuple[int, int, int, int]:
    """On one chip before the step: (parameters, moments, average, teacher)."""
    state, frozen, _ = arguments
    return tuple(_bytes(x) for x in (state.params, state.opt_state, state.ema, frozen))


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


_TOO_MUCH = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


def _compile(lowered):
    """Compile; raise DoesNotFit where the TPU compiler finds too little memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_MUCH.search(str(error))
        if not found:
            raise
        needs, has = (float(x) * 2**30 for x in found.groups())
    raise DoesNotFit(needs, has)


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
        "  by XLA's count, without remat": lambda p: _ratio(
            p.student_xla_flops_per_image, p.student_flops_per_image
        ),
        "GFLOP per image, teacher": lambda p: f"{p.teacher_flops_per_image / 1e9:.1f}",
        "  by XLA's count": lambda p: _ratio(
            p.teacher_xla_flops_per_image, p.teacher_flops_per_image
        ),
        "collectives, GB per step": lambda p: ", ".join(
            f"{kind} {size / 1e9:.2f}" for kind, size in p.collectives.items()
        ),
        "time of a step by": lambda p: p.estimate or "- (not told)",
        "  ms": lambda p: f"{1e3 * p.step_seconds:.1f}",
        "  at peak FLOP/s, ms": lambda p: f"{1e3 * p.peak_flops_seconds:.1f}",
        "  mfu": lambda p: f"{p.mfu:.2f}",
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
    return "\n".join([head, *body, *sorted({_NOTES[p.estimate] for p in plans if p.estimate})])


_NOTES = {
    CYCLES: "By the TPU compiler's own estimate of cycles: a model, and not a stopwatch.",
    ROOFLINE: "Roofline: the longer of XLA's FLOPs (cost analysis) at the peak, and the bytes that "
    "the matrix products move at full bandwidth, as if all else were fused. "
    "Communication is left out. Memory and collectives are those of XLA's CPU compiler.",
}


def _ratio(counted: float, formula: float) -> str:
    return f"{counted / 1e9:.1f} = {counted / formula:.3f} x" if formula else "-"
