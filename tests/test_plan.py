"""The plan: HLO read with its loops, FLOPs against XLA's count, memory by part, bad input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from uta_jax import UserError, chips, fitting, flops, hlo, objectives, plan
from uta_jax.__main__ import main
from uta_jax.config import default_config
from uta_jax.masking import Mask
from uta_jax.mesh import batch_sharding, make_mesh, shardings
from uta_jax.models.presets import CLIP, VIT
from uta_jax.models.vit import Seen, Vit, init_vit
from uta_jax.objectives import Task
from uta_jax.optimizer import AdamW
from uta_jax.step import Recipe, train_step

TINY = CLIP["tiny_clip"]
ARGUMENTS = ["plan", "--config=configs/demo.py", "--config.data.path=x"]


def recipe(depth=4, remat="none"):
    student = replace(VIT["uta_tiny"], depth=depth)
    teacher = replace(TINY, vision=replace(TINY.vision, depth=depth))
    task = Task("uta", student, TINY.mean, TINY.std, teacher=teacher, mask=Mask("random", 32))
    return Recipe(replace(task, remat=remat), AdamW(1e-3, 1000))


def test_a_loop_counts_as_often_as_it_runs():
    """A sharded matrix that each turn of a loop gathers."""
    mesh = make_mesh(1, 8)
    whole = jax.NamedSharding(mesh, jax.P())

    def turn(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

    sharded = jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=sharded)
    compiled = jax.jit(lambda x, w: jax.lax.scan(turn, x, w)[0]).lower(x, w).compile()
    assert hlo.read(compiled.as_text()).collectives == {"all-gather": 5 * 64 * 64 * 4}


def test_cycles_of_nested_loops_multiply():
    text = """
%inner (p: s32[]) -> s32[] {
  %f = s32[] fusion(%p), backend_config={"estimated_cycles":"7"}
}
%inner_condition (p: s32[]) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
}
%outer (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%inner_condition, body=%inner
  %g = s32[] fusion(%p), backend_config={"estimated_cycles":"100"}
}
%outer_condition (p: s32[]) -> pred[] {
  %c = s32[] constant(2)
}
ENTRY %main (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%outer_condition, body=%outer
  %h = s32[] fusion(%p), backend_config={"estimated_cycles":"1000"}
}
"""
    assert hlo.read(text).cycles == 1000 + 2 * (100 + 3 * 7)


def test_flops_by_xlas_count_are_those_of_the_formula():
    """Without remat at most 1.03 times the formula, teacher and student each; no loop hides any."""
    spec = replace(VIT["uta_tiny"], width=512, heads=8, mlp_hidden=1365)
    teacher = replace(TINY, vision=replace(TINY.vision, width=512, heads=8, mlp_hidden=2048))
    small = recipe()
    for remat in ("none", "full"):  # what a recipe computes again is not counted
        task = replace(small.task, student=spec, teacher=teacher, remat=remat)
        found = flops.by_xla(replace(small, task=task), batch=64)
        for counted, formula in zip(found, flops.by_formula(task), strict=True):
            assert formula < counted <= 1.03 * formula


def test_memory_by_part_adds_up():
    found = plan.compile_plan(recipe(), make_mesh(1, 8), "cpu:8", 64, price=0.0)
    whole = plan.compile_plan(recipe(), make_mesh(8, 1), "cpu:8", 64, price=0.0)
    assert (
        found.parameters
        == whole.parameters
        == sum(x.size for x in jax.tree.leaves(plan.state_shapes(recipe()).params))
    )
    assert whole.params_bytes == 4 * whole.parameters
    assert found.params_bytes < 0.2 * whole.params_bytes  # sharded eightfold, vectors are not
    parts = found.params_bytes + found.moments_bytes + found.teacher_bytes + found.ema_bytes
    assert found.peak_bytes == parts + found.activations_bytes
    assert set(found.collectives) >= {"all-gather"} and found.cycles == 0


def test_bytes_of_products_count_a_loop_as_often_as_it_runs():
    def product(x, w):
        return jnp.tanh(x @ w), None

    def towers(x, w):  # the same loop twice, and a branch that a device without it does without
        x = jax.jit(lambda x: jax.lax.scan(product, x, w)[0])(x)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0], lambda x: x, x)
        return jax.lax.scan(product, x, w)[0]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    shapes = x, jax.ShapeDtypeStruct((5, 64, 64), jnp.bfloat16)
    one = 4 * 8 * 64 + 2 * 64 * 64 + 4 * 8 * 64  # the product takes w as it is
    assert flops.moved_by_products(jax.make_jaxpr(towers)(*shapes).jaxpr) == 2 * 5 * one
    written_out = replace(recipe(), task=replace(recipe().task, unroll=True))
    assert flops.bytes_of_products(recipe(), 8) == flops.bytes_of_products(written_out, 8) > 0


def peak_bytes(recipe, frozen):
    """Of the compiled step on one device, by XLA's buffers."""
    arguments = plan.state_shapes(recipe), frozen, flops.batch_shapes(recipe.task, 8)
    step = jax.jit(partial(train_step, recipe=recipe), donate_argnums=0)
    memory = step.lower(*arguments).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def test_the_teacher_adds_its_parameters_and_one_layer_of_activations(monkeypatch):
    """And neither a gradient nor anything kept for one: of each layer, or of the parameters."""
    vision = replace(TINY.vision, depth=12, width=256, heads=8, mlp_hidden=1024)
    small = recipe()
    small = replace(small, task=replace(small.task, teacher=replace(TINY, vision=vision)))
    frozen = flops.frozen_shapes(small.task)
    with_teacher = peak_bytes(small, frozen)
    # The same step, whose targets are read instead.
    monkeypatch.setattr(objectives, "run_teacher", lambda f, *_, **__: Seen(f["target"], 0, 0))
    monkeypatch.setattr(objectives, "_projected", lambda frozen, tokens, *_: tokens)
    target = jax.ShapeDtypeStruct((8, 1 + 32, vision.out_dim), jnp.float32)
    without = peak_bytes(small, {"target": target})
    teacher = sum(x.size * 4 for x in jax.tree.leaves(frozen))
    tokens = 8 * (1 + vision.tokens)  # of the batch: q, k, v, their product, input, and the MLP
    layer = 4 * tokens * (6 * vision.width + vision.mlp_hidden)
    print(with_teacher, without, teacher, layer)
    assert with_teacher == pytest.approx(without + teacher + layer, rel=0.1)
    assert teacher > 0.3 * with_teacher  # that is what a gradient would add


def test_groups_of_images_move_nothing_between_devices():
    """Every device splits what it has, and gathers the parameters of a layer once for all."""
    spec, mesh = replace(TINY.vision, depth=3), make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
    shapes = jax.eval_shape(partial(init_vit, spec), jax.random.key(0))
    params = plan._placed(shapes, shardings(mesh, shapes))
    images = jax.ShapeDtypeStruct((32, 64, 64, 3), jnp.float32, sharding=batch_sharding(mesh))
    found = {}
    for groups in (1, 4):
        run = partial(Vit(spec, groups=groups).apply, method="encode")
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower({"params": params}, images).compile()
        found[groups] = hlo.read(compiled.as_text()).collectives
        whole = (32, 1 + spec.tokens, spec.width)
        assert compiled.output_shardings.shard_shape(whole)[0] == 4
    assert found[1] == found[4] and set(found[1]) == {"all-gather"}


def test_the_most_that_fits_is_found_by_few_compilations():
    """Against a chip that takes 100 images, and an estimate that is wrong in both directions."""
    found, probes = plan.compile_plan(recipe(), make_mesh(8, 1), "cpu:8", 64, price=0.0), []

    for guess in (lambda batch: 3 * batch + 40, lambda batch: 500):
        probes.clear()

        def compiled(batch, guess=guess):
            probes.append(batch)
            if batch > 100:
                raise fitting.DoesNotFit(2e9, 1e9)
            return replace(found, batch_per_chip=batch, largest_batch_per_chip=guess(batch))

        best = fitting.largest_that_fits(compiled)
        assert best.batch_per_chip == max(n for n in probes if n <= 100) >= 56
        assert len(probes) <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:4x4"], "v9:4x4: not known; there are v5e or v6e:SHAPE of 1x1, 2x2,"),
        (["--topology=v5e"], "v5e: not known; there are"),
        (["--topology=v5e:3x5"], "v5e:3x5: not known; there are"),
        (["--topology=gpu:h100"], "gpu:KINDxN with KIND of a100, h100"),
        (["--topology=gpu:h100x999"], "this process has 8 CPU devices"),
        (["--topology=cpu:999"], "this process has 8 CPU devices"),
        (["--topology=cpu:8", "--compare=student.remat=some"], "student.remat=some is not allowed"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "must multiply to the 8 devices"),
        (["--topology=cpu:8", "--config.data.batch_size=12"], "does not divide over the 8"),
        (["--topology=cpu:8", "--config.teacher.path=preset:x"], "preset:x: there are clip_b32"),
        (["--topology=cpu:8", "--config.teacher.path=nowhere"], "nowhere: no such file"),
        (["--topology=cpu:8", "--config.optim.lr=nan"], "optim.lr=nan is not allowed"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main([*ARGUMENTS, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_command(tmp_path, capsys):
    arguments = ["--topology=cpu:8", "--batch-per-chip=2", f"--json={tmp_path}/plan.json"]
    assert main([*ARGUMENTS, *arguments, "--config.teacher.path=preset:tiny_clip"]) == 0
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["chips"] == 8 and figures["batch_per_chip"] == 2
    assert "GB per chip" in capsys.readouterr().out


def test_the_peak_of_a_tpu_is_what_its_compiler_says():
    """800 images a chip of UTA-B/16 have 19.5 GB of temporaries, and fit 16.9 GB of a v5e."""
    memory = SimpleNamespace(
        argument_size_in_bytes=3, temp_size_in_bytes=20, peak_memory_in_bytes=15
    )
    assert plan._peak_bytes(memory, chips.TPUS["v5e"]) == 15
    assert plan._peak_bytes(memory, chips.GPUS["h100"]) == 23
    assert plan._peak_bytes(memory, None) == 23


def test_a_tpu_slice_that_is_not_here(tmp_path):
    """The TPU compiler's own figures for the demo's step, in a process of its own."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "uta_jax", *ARGUMENTS, "--topology=v5e:2x4"]
    options = ["--batch-per-chip=8", "--config.mesh.fsdp=8", f"--json={tmp_path}/plan.json"]
    done = subprocess.run(
        [*command, *options], env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["cycles"] > 0 and 0 < figures["mfu"] < 1
    assert figures["collectives"]["all-gather"] > 0
    held = ("params_bytes", "moments_bytes", "ema_bytes", "teacher_bytes", "activations_bytes")
    assert figures["peak_bytes"] == sum(figures[name] for name in held)
    assert figures["activations_bytes"] > 0
    assert done.stderr == ""  # the library's own noise would drown a mistake


TOO_MUCH = """
import jax, jax.numpy as jnp
from uta_jax import chips, plan
one = jax.sharding.SingleDeviceSharding(chips.devices("v5e:2x4")[0])
much = jax.ShapeDtypeStruct((2**25, 512), jnp.float32, sharding=one)  # 64 GiB
plan._compile(jax.jit(lambda x: x + 1).lower(much))
"""


def test_what_the_tpu_compiler_refuses_is_told_in_figures():
    """By what it can use of a chip: more than the 16e9 bytes that one is sold by."""
    pytest.importorskip("libtpu")
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", TOO_MUCH], env=environment, capture_output=True, text=True
    )
    assert re.search(r"DoesNotFit: .* least 137.44 GB of the 16.91 GB of a chip", done.stderr)
    assert chips.TPUS["v5e"].memory == pytest.approx(16.91e9, rel=1e-3)


def fit_of(needs, moment_bytes=4e9, has=16e9):
    """A step of 2 GB + 2 GB of moments by fsdp + what remat keeps, on 8 chips; and ``held``."""
    probes = []

    def held(config):
        if config.mesh.fsdp > 8:
            raise UserError("no divisor")
        return 2e9 + moment_bytes / config.mesh.fsdp

    def compiled(config, per_chip):
        probes.append(per_chip)
        used = held(config) + per_chip * needs[config.student.remat]
        if used > has:
            raise fitting.DoesNotFit(used, has)
        return SimpleNamespace(peak_bytes=used)

    return compiled, held, probes


@pytest.mark.parametrize(
    ("moments", "needs", "expected", "compilations"),
    [
        # 32 images of 0.5 GB: 16 and 2 + 4 GB.
        (
            4e9,
            {"names": 0.5e9, "full": 0.1e9},
            "compiled, --batch-per-chip=16 (14.00 GB) or --config.student.remat=full (9.20 GB) "
            "fits",
            2,
        ),
        (
            12e9,
            {"names": 0.3e9, "full": 0.29e9},
            "compiled, --config.mesh.fsdp=4 (14.60 GB) or --batch-per-chip=6 (15.80 GB) fits; "
            "does not: --config.student.remat=full (23.28 GB)",
            3,
        ),
        (
            80e9,
            {"names": 0.1e9, "full": 0.01e9},
            "compiled, --config.mesh.fsdp=8 (15.20 GB) fits; neither batch nor remat can: state "
            "and teacher alone take 82.00 GB",
            1,
        ),
        (
            8e11,
            {"names": 0.1e9, "full": 0.01e9},
            "nothing tried fits; neither batch nor remat can: state and teacher alone take 802.00 "
            "GB",
            0,
        ),
    ],
)
def test_what_would_make_a_step_fit_is_compiled(moments, needs, expected, compilations):
    compiled, held, probes = fit_of(needs, moments)
    config = default_config()
    with pytest.raises(fitting.DoesNotFit, match="GB too much") as error:
        compiled(config, 32)
    probes.clear()
    assert fitting.what_would_fit(error.value, config, 32, compiled, held) == expected
    assert len(probes) == compilations
