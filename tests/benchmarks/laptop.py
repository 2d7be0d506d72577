"""What UTA is worth on a laptop: uta, mim, distill and maskalign at equal training FLOPs.

    python tests/benchmarks/laptop.py [--out runs/laptop] [--data data/emoji_scenes] [--steps 200]
        [--seeds 3] [--jobs 2] [--quick] [--table] [--json FILE]

Every cell is a training of the demo's student by one of ``configs/demo*.py``, in a workdir of its
own under ``--out``, and ends with all evaluators that mean something for it. ``--steps`` is what
``uta`` (random mask, half of the patches) takes; what the others take follows from XLA's count of
the FLOPs of their whole step, teacher included, so that all spend the same; "equal steps" gives
them as many as ``uta``. The mask of ``uta`` is ablated by kind and by what is kept, at equal FLOPs;
``uta`` with all kept is ``distill``, the same update. Learning rates and schedules are those of the
recipes, the warm-up is the same share of each run.

As many cells as ``--jobs`` (default: one for each core) run side by side, each in a process with
cores of its own: models this small gain little from a second core. Images/s are those of such a
cell; what a step costs is measured before them, one method at a time.

The same command goes on where it was stopped. ``--quick``: 80 steps, one seed; tells that it works,
and nothing of the methods. ``--table``: what is there, training nothing. Spread: the standard
deviation over seeds.
"""

import argparse
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from tqdm import tqdm

from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax import metrics
from uta_jax.checkpoint import load_run
from uta_jax.config_files import read_config
from uta_jax.data.files import output
from uta_jax.evals import EVALUATORS, figures_of, fitting
from uta_jax.interop.teacher import load_clip
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import compile_step, init_state, state_shapes
from uta_jax.train import cast, train

ROOT = Path(__file__).parents[2]
RECIPES = {
    "uta": "demo.py", "mim": "demo_mim.py", "distill": "demo_distill.py",
    "maskalign": "demo_maskalign.py",
}  # fmt: skip
KINDS, KEEPS = ("random", "block", "reversed_block"), (0.25, 0.5, 0.75)
TURNS = 15  # of the steps of all methods, after the one that compiles
WARMUP = 50 / 1200  # of the steps, as in configs/demo.py
SHOWN = {
    "zero-shot": "zeroshot/top1", "image to text": "retrieval/image_to_text/1",
    "kNN": "knn/top1/20", "probe": "linear_probe/top1", "mIoU": "dense/miou",
    "cos CLS": "alignment/cos_cls", "cos patch": "alignment/cos_patch",
}  # fmt: skip
QUICK = {"steps": 80, "seeds": 1}


class Cell(NamedTuple):
    """One line of the table, before its seeds."""

    method: str
    kind: str = ""  # of the mask; "": the recipe's own
    keep: float = 0.0  # share of the patches; 0: the recipe's own
    equal: str = "FLOPs"

    @property
    def name(self) -> str:
        mask = f"-{self.kind}-{self.keep:g}" if self.keep else ""
        return f"{self.method}{mask}-equal-{self.equal}"


METHODS = [Cell(method) for method in RECIPES]
STEPS = [Cell(method, equal="steps") for method in RECIPES if method != "uta"]
ABLATION = [Cell("uta", k, keep) for k, keep in itertools.product(KINDS, KEEPS)]
ABLATION = [cell for cell in ABLATION if cell[1:3] != ("random", 0.5)]  # is the first method


def recipe_config(cell: Cell, args, steps: int, seed: int):
    """The configuration of a cell."""
    values = {
        "data.path": args.data, "eval.path": args.data, "seed": seed, "train.steps": steps,
        "optim.warmup_steps": max(1, round(WARMUP * steps)), "train.eval_every": 0,
        "train.save_every": max(1, steps // 4), "train.panels": 0, "train.keep": 1,
        "eval.fit.split": "train[:20%]",
    }  # fmt: skip
    if cell.keep:
        values |= {"mask.kind": cell.kind, "mask.ratio": 1 - cell.keep, "mask.min_block": 4}
    path = str(ROOT / "configs" / RECIPES[cell.method])
    return read_config(path, [f"--config.{key}={value}" for key, value in values.items()])


class Step:
    """The update of a cell on one device."""

    def __init__(self, cell: Cell, args, unroll: bool = False):
        config = recipe_config(cell, args, args.steps, 0)
        config.eval.path = ""  # its batch need not divide
        with configs.blame("config.teacher.path"):
            teacher = load_clip(config.teacher.path)
        recipe = configs.make_recipe(config, teacher.spec, len(configs.open_data(config.data)))
        self.recipe = replace(recipe, task=replace(recipe.task, unroll=unroll))
        self.mesh = meshes.make_mesh(devices=jax.devices()[:1])
        size, self.batch = recipe.task.student.image_size, config.data.batch_size
        self.image_shape = (self.batch, size, size, 3)
        self.frozen = {"vision": cast(teacher.params["vision"], "float32")}
        with jax.set_mesh(self.mesh):
            self.update = compile_step(self.recipe, self.mesh, self.frozen)

    def flops_per_image(self) -> float:
        """XLA's count for a whole step: teacher, student forward and backward, update."""
        images = {"image": jax.ShapeDtypeStruct(self.image_shape, np.uint8)}
        with jax.set_mesh(self.mesh):
            lowered = self.update.lower(state_shapes(self.recipe), self.frozen, images)
            return lowered.compile().cost_analysis()["flops"] / self.batch

    def timed(self) -> Iterator[float]:
        """Seconds of one update after another, the first of which compiles."""
        with jax.set_mesh(self.mesh):
            state = init_state(self.recipe, self.mesh)
            frozen = meshes.place(self.mesh, self.frozen)
        batch = {"image": np.random.default_rng(0).integers(0, 256, self.image_shape, np.uint8)}
        while True:
            with jax.set_mesh(self.mesh):
                start = time.perf_counter()
                state, values = self.update(state, frozen, batch)
                jax.block_until_ready(values)
            yield time.perf_counter() - start


def costs(args, flops: dict[str, float]) -> dict[str, dict[str, float]]:
    """A step of each method against that of the first, in turns: method -> ratios to ``uta``."""
    path = Path(args.out) / "costs.json"
    if not path.exists():
        steps = {cell.name: Step(cell, args).timed() for cell in METHODS}
        turns = [{name: next(step) for name, step in steps.items()} for _ in range(TURNS + 1)][1:]
        first = METHODS[0].name
        found = {
            cell.method: {
                "FLOPs": flops[cell.name] / flops[first],
                "time": statistics.median(turn[cell.name] / turn[first] for turn in turns),
            }
            for cell in METHODS
        }
        with output(path) as file:
            file.write(json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text())


def all_flops(args) -> dict[str, float]:
    """Name of each cell -> FLOPs an image; counted once and kept."""
    path = Path(args.out) / "flops.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    cells = [cell for cell in METHODS + ABLATION if cell.name not in found]
    for cell in tqdm(cells, desc="count FLOPs", unit="recipe", disable=not cells):
        found[cell.name] = Step(cell, args, unroll=True).flops_per_image()
        with output(path) as file:
            file.write(json.dumps(found, indent=2) + "\n")
    return found | {cell.name: found[Cell(cell.method).name] for cell in STEPS}


def steps_of(cell: Cell, flops: dict[str, float], steps: int) -> int:
    """Updates of a cell; all have the same batch size."""
    same = cell.equal == "steps"
    return steps if same else round(steps * flops[METHODS[0].name] / flops[cell.name])


def done(workdir: Path, steps: int) -> dict | None:
    """The figures of a cell that has ended; None where it has not, or not all were measured."""
    path = workdir / "evaluate.json"
    found = json.loads(path.read_text()) if path.exists() else {"step": 0}
    return found if found["step"] == steps else None


def run_cell(cell: Cell, seed: int, args, steps: int) -> None:
    """Train, or go on, and measure."""
    workdir = folder_of(cell, seed, args)
    train(recipe_config(cell, args, steps, seed), workdir)
    run = load_run(workdir)
    # The teacher is the same in all cells: its features are kept, its figures asked for once.
    figures = figures_of(
        run,
        fitting(EVALUATORS, run.spec),
        folder=Path(args.out) / "features",
        with_teacher=(cell, seed) == (METHODS[0], 0),
    )
    with output(workdir / "evaluate.json") as file:
        file.write(json.dumps(figures) + "\n")


def run_all(args, flops: dict[str, float]) -> None:
    """Every cell that has not ended, in processes side by side."""
    cells = all_cells(args)
    missing = [
        (cell, seed)
        for cell, seed in cells
        if not done(folder_of(cell, seed, args), steps_of(cell, flops, args.steps))
    ]
    cores = queue.SimpleQueue()
    for share in shares(args.jobs):
        cores.put(share)

    def start(cell: Cell, seed: int) -> None:
        workdir = folder_of(cell, seed, args)
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={workdir.name}"]
        if mine := cores.get():
            os.sched_setaffinity(0, mine)  # of this thread, whose child inherits it
        with open(workdir / "log.txt", "a") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        cores.put(mine)
        if code:
            sys.exit(f"{workdir.name} ended with {code}; its last words are in {workdir}/log.txt")

    bar = tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", smoothing=0)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for job in as_completed([pool.submit(start, *each) for each in missing]):
            job.result()
            bar.update()
    finally:  # no more of them; those that run end first
        pool.shutdown(cancel_futures=True)
        bar.close()


def shares(jobs: int) -> list[set[int]]:
    """The cores of each job; empty sets where processes cannot be bound to cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[job::jobs]) for job in range(jobs)]


def all_cells(args) -> list[tuple[Cell, int]]:
    """Cells and seeds; one seed of all before the next."""
    return [(cell, n) for n in range(args.seeds) for cell in METHODS + STEPS + ABLATION]


def folder_of(cell: Cell, seed: int, args) -> Path:
    """The workdir of a training; another ``--steps`` is another training, with its own schedule."""
    return Path(args.out) / f"{cell.name}-{args.steps}-seed{seed}"


def figure_of(found: dict, figure: str, whose: str = "student") -> float | None:
    """``EVALUATOR/FIGURE`` of an ``evaluate.json``; None where it was not measured."""
    name, figure = figure.split("/", 1)
    return found.get(name, {}).get(whose, {}).get(figure)


def spread(values: list, figure: str) -> str:
    """Mean and, of several, standard deviation: shares in percent, cosines as they are."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    percent = not figure.startswith("cos")
    values = [100 * value for value in values] if percent else values
    digits = 1 if percent else 3
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text + " %" * percent


def mask_of(cell: Cell, args) -> str:
    """The mask in words."""
    config = recipe_config(cell, args, args.steps, 0)
    if not OBJECTIVES[config.objective].masks or not config.mask.ratio:
        return "all kept"
    return f"{config.mask.kind}, {1 - config.mask.ratio:.0%} kept"


def line(cell: Cell, args, found: list[tuple[Path, dict]], flops: float) -> dict[str, str]:
    """A row of the table."""
    rates = [
        statistics.median(r["images_per_s"] for r in rows if "images_per_s" in r)
        for rows in (metrics.read(workdir / "metrics.jsonl") for workdir, _ in found)
    ]
    scores = {
        head: spread([figure_of(each, figure) for _, each in found], figure.split("/", 1)[1])
        for head, figure in SHOWN.items()
    }
    about = {
        "method": cell.method, "equal": cell.equal,
        "mask": mask_of(cell, args),
        "seeds": str(len(found)), "steps": str(found[0][1]["step"]),
        "MFLOP/image": f"{flops / 1e6:.0f}", "images/s": f"{statistics.mean(rates):.0f}",
    }  # fmt: skip
    return about | scores


def table(args, flops: dict[str, float]) -> list[dict[str, str]]:
    """The rows of all cells that have a seed that ended, and the teacher's."""
    rows, teacher = [], {}
    for cell in METHODS + STEPS + ABLATION:
        if cell.name not in flops:
            continue
        steps = steps_of(cell, flops, args.steps)
        folders = [folder_of(cell, seed, args) for seed in range(args.seeds)]
        found = [(folder, each) for folder in folders if (each := done(folder, steps))]
        if found:
            rows.append(line(cell, args, found, flops[cell.name]))
            teacher = teacher or found[0][1]  # of the first cell, whose first seed asks for it
    if not rows:
        return []
    of_teacher = {
        head: spread([figure_of(teacher, figure, "teacher")], figure.split("/", 1)[1])
        for head, figure in SHOWN.items()
    }
    last = {name: of_teacher.get(name, "") for name in rows[0]} | {"method": "teacher"}
    return [*rows, last]


def show(rows: list[dict[str, str]]) -> None:
    """As Markdown."""
    if not rows:
        print("no cell has ended yet")
        return
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def parsed() -> argparse.Namespace:
    """The command line; ``--quick`` has its own folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="", help="folder of all workdirs (default runs/laptop)")
    parser.add_argument("--data", default="data/emoji_scenes")
    parser.add_argument("--steps", type=int, default=200, help="of uta")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the folder of the cell to run
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--json", help="write the table to this file as well")
    args = parser.parse_args()
    for name in ("steps", "seeds", "jobs"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name}={value}: at least 1")
    if args.quick:
        vars(args).update(QUICK)
    args.out = args.out or ("runs/laptop-quick" if args.quick else "runs/laptop")
    args.data = str(Path(args.data).resolve())
    return args


def main() -> None:
    """Count, train what is missing, print the table."""
    args = parsed()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.table:
        path = Path(args.out) / "flops.json"
        flops = json.loads(path.read_text()) if path.exists() else {}
        flops |= {c.name: flops[m] for c in STEPS if (m := Cell(c.method).name) in flops}
    else:
        flops = all_flops(args)
        if args.only:
            cell, seed = next(x for x in all_cells(args) if folder_of(*x, args).name == args.only)
            run_cell(cell, seed, args, steps_of(cell, flops, args.steps))
            return
        costs(args, flops)
        run_all(args, flops)
    rows = table(args, flops)
    show(rows)
    if (Path(args.out) / "costs.json").exists():
        for method, ratio in list(costs(args, flops).items())[1:]:
            print(f"a step of {method}: {ratio['FLOPs']:.2f} x the FLOPs of uta's, ", end="")
            print(f"{ratio['time']:.2f} x its time (median of {TURNS} turns in one process)")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
