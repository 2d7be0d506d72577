"""What a CPU step owes to its matrix products: the most that could be won against PyTorch.

    python tests/benchmarks/products.py [--sizes demo,demo_clip,vit_b16] [--dtype float32]
        [--rounds 7] [--each]

All matrix products of one update, each as often as the update runs it, are timed alone, by XLA and
by PyTorch (MKL or oneDNN) on the same shapes, in turns; so are the two whole steps of ``step.py``.
One thread, processor time: the fastest of the rounds. ``rest``: the step less its products -
norms, softmax, activations, copies, the update. ``best ratio``: images/s of ours over PyTorch's if
our rest took no time at all.
"""

import argparse
import math
import string
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
import step
import torch
from torch_uta import TorchStep
from tqdm import tqdm

from uta_jax import flops, processes
from uta_jax import mesh as meshes
from uta_jax.step import state_shapes, train_step


def products_of(recipe, batch: int) -> Counter:
    """(shape, shape, einsum of both) -> how often an update computes it; convolutions left out."""
    arguments = flops.frozen_shapes(recipe.task), flops.batch_shapes(recipe.task, batch)
    update = partial(train_step, recipe=recipe)
    jaxpr = jax.make_jaxpr(update)(state_shapes(recipe), *arguments).jaxpr
    found = Counter()
    for eqn, times in flops.products(jaxpr):
        if eqn.primitive.name == "dot_general":
            a, b = (x.aval.shape for x in eqn.invars)
            found[a, b, as_einsum(a, b, *eqn.params["dimension_numbers"])] += times
    return found


def as_einsum(a: tuple, b: tuple, contracted: tuple, batched: tuple) -> str:
    """``dot_general``'s dimensions as ``ab,bc->ac``."""
    letters = iter(string.ascii_letters)
    left, right = [next(letters) for _ in a], [next(letters) for _ in b]
    for pairs in (contracted, batched):
        for i, j in zip(*pairs, strict=True):
            right[j] = left[i]
    shared = [left[i] for i in batched[0]]
    free = [x for x in left if x not in right] + [x for x in right if x not in left]
    return f"{''.join(left)},{''.join(right)}->{''.join(shared + free)}"


def fastest(calls: dict, rounds: int) -> dict[str, float]:
    """Least processor time of each, in turns, in seconds; the first call is not counted."""
    found = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def both(a: tuple, b: tuple, how: str, dtype: str) -> dict:
    """The same product by XLA and by PyTorch, of ``dtype`` and to ``dtype``."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape, np.float32) for shape in (a, b))
    jx, jy = (jax.numpy.asarray(array, dtype) for array in (x, y))
    tx, ty = (torch.tensor(array).to(getattr(torch, dtype)) for array in (x, y))
    ours = jax.jit(partial(jax.numpy.einsum, how)).lower(jx, jy).compile()
    return {
        "ours": lambda: jax.block_until_ready(ours(jx, jy)),
        "torch": lambda: torch.einsum(how, tx, ty),
    }


def benchmark(size: str, dtype: str, rounds: int, each: bool) -> None:
    """Print the figures of one size; ``each``: of every product as well."""
    recipe, batch = step.make_recipe(size, dtype)
    found = products_of(recipe, batch)
    alone, operations, lines = Counter(), 0, []
    for (a, b, how), times in tqdm(found.items(), desc=f"{size}: products", leave=False):
        left, right = how.split("->")[0].split(",")
        extent = dict(zip(left + right, a + b, strict=True))
        one = 2 * math.prod(extent.values())
        seconds = fastest(both(a, b, how, dtype), rounds)
        operations += times * one
        alone.update({name: times * x for name, x in seconds.items()})
        rate = "".join(f"  {name} {one / x / 1e9:4.0f} GFLOP/s" for name, x in seconds.items())
        about = f"  {times:3d} x {how} {a} {b}: {times * one / 1e9:.2f} GFLOP"
        lines.append((times * one, about + rate))
    if each:
        print(*(text for _, text in sorted(lines, reverse=True)), sep="\n")
    frozen = {"vision": step.teacher_params(size, recipe)}
    ours = step.OurStep(recipe, frozen)
    theirs = TorchStep(recipe, meshes.fetch(ours.state.params), frozen)
    side = recipe.task.student.image_size
    image_bhwc = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    calls = {"ours": partial(ours, image_bhwc), "torch": partial(theirs, image_bhwc)}
    whole = fastest(calls, rounds)
    print(
        f"{size}, {dtype}: {operations / 1e9:.1f} GFLOP in {sum(found.values())} products, "
        f"{batch} images"
    )
    for name in calls:
        print(
            f"  {name:5s}  step {1e3 * whole[name]:6.0f} ms   products alone "
            f"{1e3 * alone[name]:6.0f} ms, {operations / alone[name] / 1e9:3.0f} GFLOP/s   "
            f"rest {1e3 * (whole[name] - alone[name]):6.0f} ms"
        )
    print(
        f"  ratio {whole['torch'] / whole['ours']:.2f}, best ratio "
        f"{whole['torch'] / alone['ours']:.2f}",
        flush=True,
    )


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(step.SIZES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", action="store_true", help="the rate of every product, too")
    args = parser.parse_args()
    processes.settle()
    torch.set_num_threads(1)
    for size in args.sizes.split(","):
        benchmark(size, args.dtype, args.rounds, args.each)


if __name__ == "__main__":
    main()
