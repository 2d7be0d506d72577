"""The plan: HLO read with its loops, FLOPs against XLA's count, memory by part, bad input."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from uta_jax import hlo, plan
from uta_jax.__main__ import main
from uta_jax.masking import Mask
from uta_jax.mesh import make_mesh
from uta_jax.models.presets import CLIP, VIT
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


def test_flops_by_formula_are_those_of_xla():
    """Towers of one block, whose loop XLA counts rightly; the formula counts products alone."""
    small, batch = recipe(depth=1), 8
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    state = plan._placed(plan.state_shapes(small), plan.state_shardings(small, mesh))
    arguments = state, plan._frozen(small, mesh), plan._inputs(small, mesh, batch)
    step = jax.jit(lambda s, f, b: train_step(s, f, b, recipe=small))
    with jax.set_mesh(mesh):
        counted = step.lower(*arguments).compile().cost_analysis()["flops"]
    formula = batch * sum(plan.flops_per_image(small))
    assert formula < counted < 1.25 * formula  # the rest: softmax, norms, AdamW, at width 128


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


def test_the_most_that_fits_is_found_by_few_compilations():
    """Against a chip that takes 100 images, and an estimate that is wrong in both directions."""
    found, probes = plan.compile_plan(recipe(), make_mesh(8, 1), "cpu:8", 64, price=0.0), []

    for guess in (lambda batch: 3 * batch + 40, lambda batch: 500):
        probes.clear()

        def compiled(batch, guess=guess):
            probes.append(batch)
            if batch > 100:
                raise plan.DoesNotFit("too much")
            return replace(found, batch_per_chip=batch, largest_batch_per_chip=guess(batch))

        best = plan.largest_that_fits(compiled)
        assert best.batch_per_chip == max(n for n in probes if n <= 100) >= 56
        assert len(probes) <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:4x4"], "v9:4x4: not known; give a kind of v5e, v5p, v6e or cpu"),
        (["--topology=v5e"], "v5e: not known"),
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
    assert done.stderr == ""  # the library's own noise would drown a mistake
    options[0] = "--batch-per-chip=20000"
    much = subprocess.run(
        [*command, *options], env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert much.returncode == 2 and much.stderr.count("\n") == 1, much.stderr[-2000:]
    assert "GB too much: try --batch-per-chip=max or" in much.stderr
