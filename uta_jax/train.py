"""The training loop.

Order of one turn, and why:
  1. take the batch that was put on the devices while the last step ran;
  2. dispatch the update, which returns at once;
  3. fetch the metrics of the update *before*: it is done by now, and this one keeps the devices
     busy;
  4. stop if they are not finite, before anything is saved;
  5. save, once the metrics of this very update are known to be finite;
  6. evaluate, after saving, so that a fault in an evaluator costs no training.

Restart precedence: (1) the newest checkpoint of the workdir; (2) a fresh start. The run prints
which.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from uta_jax import UserError, metrics, processes
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.checkpoint import Checkpoints
from uta_jax.config_files import load_config, save_config
from uta_jax.data.loader import TrainLoader
from uta_jax.data.sources import open_source
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.evals.zeroshot import ZeroShot
from uta_jax.interop.export import fitting_formats
from uta_jax.interop.teacher import load_clip, read_spec
from uta_jax.metrics import Meter, Writer, progress_bar
from uta_jax.objectives import OBJECTIVES
from uta_jax.step import Recipe, TrainState, compile_step, init_state
from uta_jax.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """What the loop works with: everything that stays while the state changes."""

    config: ConfigDict
    recipe: Recipe
    mesh: jax.sharding.Mesh
    workdir: Path
    frozen: dict  # the teacher's vision tower, on the devices; {} without a teacher
    evaluate: Callable[[TrainState], dict[str, float]]
    provenance: dict  # of the teacher; saved with every checkpoint
    allow_data_change: bool = False  # go on with other data, seed or batch size than was saved


def train(
    config: ConfigDict, workdir: str | Path, allow_data_change: bool = False
) -> dict[str, float]:
    """Train ``config`` in ``workdir``, resuming what stands there; returns the last figures.

    ``allow_data_change``: also where the data, the seed or the batch size is not what it was.

    Raises UserError for input that does not fit together, before anything is compiled. Changes how
    this process allocates memory and, with several CPU devices, dispatches (``processes.settle``);
    of several processes, a failure of one ends them all.
    """
    configs.check(config)
    with processes.started(config.platform, **config.processes):
        return _trained(config, workdir, allow_data_change)


def _trained(config: ConfigDict, workdir: str | Path, allow_data_change: bool) -> dict[str, float]:
    source = configs.open_data(config.data)
    has_teacher = OBJECTIVES[config.objective].needs_teacher
    with configs.blame("config.teacher.path"):
        spec = read_spec(config.teacher.path) if has_teacher else None
    recipe = configs.make_recipe(config, spec, len(source))
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    processes.say(processes.table(mesh))
    processes.agree("what to train", _facts(config, recipe, source))
    workdir = make_workdir(workdir)
    with jax.set_mesh(mesh):
        run = replace(prepare(config, recipe, mesh, workdir), allow_data_change=allow_data_change)
        checkpoints = Checkpoints(workdir, config.train.keep)
        try:
            return _train(run, checkpoints, source)
        finally:
            checkpoints.close()


def _facts(config: ConfigDict, recipe: Recipe, source) -> dict:
    """What every process must have alike."""
    facts = {f"config.{key}": value for key, value in configs.leaves(config).items()}
    return facts | {"steps": recipe.optim.total_steps, "data fingerprint": source.fingerprint()}


def make_workdir(workdir: str | Path) -> Path:
    """Create ``workdir`` if need be; UserError if something else stands there."""
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; name a directory") from error
    return workdir


def prepare(config: ConfigDict, recipe: Recipe, mesh, workdir: Path) -> Run:
    """Load the teacher, place its vision tower on the devices, set up the evaluation."""
    frozen, text, provenance = {}, None, {}
    if recipe.task.teacher:
        with configs.blame("config.teacher.path"):
            teacher = load_clip(config.teacher.path, recipe.task.teacher.vision.image_size)
        vision = cast(teacher.params["vision"], recipe.task.teacher_dtype)
        frozen = meshes.place(mesh, {"vision": vision})
        text, provenance = teacher.params["text"], teacher.provenance
    evaluate = make_evaluator(config, recipe, mesh, text)
    return Run(config, recipe, mesh, workdir, frozen, evaluate, provenance)


def cast(params: dict, dtype: str) -> dict:
    """``params`` in another floating point type, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jax.numpy.dtype(dtype)), params)


def make_evaluator(config: ConfigDict, recipe: Recipe, mesh, teacher_text: dict | None):
    """The function ``state -> figures`` that the loop calls between updates."""
    if not config.eval.path:
        return lambda state: {}
    with configs.blame("config.eval"):
        source = open_source(config.eval.source, config.eval.path, config.eval.split)
        sharding = meshes.batch_sharding(mesh)
        options = (sharding, configs.reading_of(config.data))
        zeroshot = ZeroShot(source, config.eval.templates, config.eval.batch_size, *options)

    def evaluate(state: TrainState) -> dict[str, float]:
        params = meshes.fetch(state.ema or state.params)
        text = params["text"] if recipe.task.text else teacher_text
        figures = zeroshot(recipe.task.clip, {"vision": params["vision"], "text": text})
        return {f"zeroshot/{name}": value for name, value in figures.items()}

    return evaluate


def _train(run: Run, checkpoints: Checkpoints, source) -> dict[str, float]:
    loader = _make_loader(run, source)  # checks the data, reads none yet
    try:
        state, saved = _start(run, checkpoints)
        at = {"step": int(state.step), "teacher": run.provenance.get("sha256")}
        processes.agree("what to start from", at)
        if saved:
            _check_same(run, loader, saved)
        _record_config(run, int(state.step))
        with Log(run, checkpoints, int(state.step)) as log:
            if saved and _evaluates(run, int(state.step)) and not log.has_scores:
                with log.aside():
                    log.scored(int(state.step), run.evaluate(state))  # lost to the interruption
            with Watchdog(run.config.train.timeout_s, "config.train.timeout_s") as watchdog:
                return _loop(run, state, loader, log, checkpoints, watchdog)
    finally:
        loader.close()


def _make_loader(run: Run, source) -> TrainLoader:
    data, task = run.config.data, run.recipe.task
    return TrainLoader(
        source,
        batch_size=data.batch_size,
        seed=run.config.seed,
        image_size=task.student.image_size,
        crop_scale=data.crop_scale,
        flip=data.flip,
        tokenizer=Tokenizer(task.text.context) if task.text else None,
        sharding=meshes.batch_sharding(run.mesh),
        reading=configs.reading_of(data),
        max_bad_fraction=data.max_bad_fraction,
        bad_file=run.workdir / "bad_examples.jsonl",
    )


def _check_same(run: Run, loader: TrainLoader, saved: dict) -> None:
    """Refuse to go on with other data or another teacher than the run began with."""
    if changes := loader.resume(saved["data"], run.allow_data_change):
        processes.say(
            f"DATA CHANGED: {changes}. The run goes on after {loader.examples_seen} examples, in "
            "the order of the data as it is now: of the epoch begun, some examples may come twice "
            "and others not at all"
        )
    if saved["teacher"].get("sha256") != run.provenance.get("sha256"):
        raise UserError(
            f"config.teacher.path={run.config.teacher.path} is not the teacher this run began with "
            f"({saved['teacher']}): use that one, or another workdir"
        )


def _start(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict]:
    """The state to go on from, and the meta it was saved with ({} when fresh)."""
    if checkpoints.latest() is not None:
        state, saved = checkpoints.restore(run.recipe, run.mesh)
        step, total = int(state.step), run.recipe.optim.total_steps
        done = "; the run is complete, nothing is left to train" if step >= total else ""
        processes.say(f"RESUMED at step {step} of {total} from {run.workdir}{done}")
        return state, saved
    state = init_state(run.recipe, run.mesh)
    count = parameter_overview.count_parameters(state.params)
    fits = ", ".join(fitting_formats(run.recipe.task.clip)) or "no format: see README, Limits"
    processes.say(f"FRESH START in {run.workdir}: {count:,} parameters to train; exports as {fits}")
    return state, {}


def _record_config(run: Run, step: int) -> None:
    """Write the run's configuration; a resumed run says first what it changes."""
    if not processes.is_first():
        return
    path = run.workdir / "config.json"
    if step and path.exists():
        before = configs.leaves(load_config(path))
        for key, value in configs.leaves(run.config).items():
            if value != before[key]:
                print(f"CHANGED from step {step} on: config.{key}: {before[key]} -> {value}")
    save_config(run.config, path)


def _evaluates(run: Run, step: int) -> bool:
    every = run.config.train.eval_every
    return step == run.recipe.optim.total_steps or bool(every and step % every == 0)


class Log:
    """The figures of a run: fetched one update late, checked, averaged, written, shown."""

    def __init__(self, run: Run, checkpoints: Checkpoints, step: int):
        self.figures: dict[str, float] = {}
        self._every, self._total = run.config.train.log_every, run.recipe.optim.total_steps
        self._checkpoints, self._pending = checkpoints, None
        self._writer = Writer(run.workdir, step) if processes.is_first() else None
        has_scores = self._writer and any(
            "zeroshot/top1" in row and row["step"] == step
            for row in metrics.read(run.workdir / "metrics.jsonl")
        )
        self.has_scores = processes.gather("scores", has_scores)[0]
        self._meter = Meter(run.config.data.batch_size)
        self._bar = progress_bar(self._total, step, shown=processes.is_first())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def dispatched(self, step: int, values: dict, data_wait_s: float, bad_examples: int) -> None:
        """Note the update just dispatched, after settling the one before it."""
        self.settle()
        self._pending = (step, values, data_wait_s, bad_examples)

    def settle(self) -> None:
        """Wait for the update noted last and count its metrics.

        Raises FloatingPointError, naming the step, if one of them is not finite.
        """
        if self._pending is None:
            return
        (step, values, data_wait_s, bad_examples), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"step {step}: metrics are not finite: {values}. The newest checkpoint is that of "
                f"step {self._checkpoints.latest()}; lower config.optim.lr or config.optim.b2"
            )
        self._meter.add(values, data_wait_s)
        self._bar.update()
        if step % self._every == 0 or step == self._total:
            self._write_means(step, bad_examples)

    def _write_means(self, step: int, bad_examples: int) -> None:
        bad_examples = sum(processes.gather(f"bad examples until {step}", bad_examples))
        means = self._meter.read() | {"bad_examples": bad_examples}
        self.figures |= {name: x for name, x in means.items() if not isinstance(x, list)}
        self._write(step, means)
        shown = {"loss": "{:.4f}", "images_per_s": "{:.0f}", "data_wait_ms": "{:.1f}"}
        shown |= {"bad_examples": "{}"} if bad_examples else {}
        postfix = {name: form.format(means[name]) for name, form in shown.items()}
        self._bar.set_postfix(postfix, refresh=False)

    def scored(self, step: int, scores: dict[str, float]) -> None:
        """Record the figures of an evaluation."""
        if scores:
            self.figures |= scores
            self._write(step, scores)
            line = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            if self._writer:
                self._bar.write(f"step {step}: {line}")

    def _write(self, step: int, figures: dict) -> None:
        if self._writer:
            self._writer.write(step, figures)

    @contextmanager
    def aside(self):
        """Leave the time spent in this context out of the rate."""
        since = time.perf_counter()
        yield
        self._meter.pause(time.perf_counter() - since)


def _loop(run: Run, state, loader, log: Log, checkpoints, watchdog) -> dict[str, float]:
    """The order of one turn is that of the module's docstring."""
    config, total = run.config.train, run.recipe.optim.total_steps
    update, step = compile_step(run.recipe, run.mesh, run.frozen), int(state.step)
    while step < total:
        watchdog.at(f"step {step + 1} (batch {step} of the run)")
        batch = _next(loader, step)
        state, values = update(state, run.frozen, batch)
        step += 1
        log.dispatched(step, values, loader.data_wait_s, loader.bad_examples)
        if step % config.save_every == 0 or step == total:
            log.settle()
            watchdog.at(f"saving step {step}")
            with log.aside():
                checkpoints.save(state, {"data": _data_state(loader), "teacher": run.provenance})
        if _evaluates(run, step):
            log.settle()
            watchdog.at(f"the evaluation after step {step}")
            with log.aside():
                log.scored(step, run.evaluate(state))
    return log.figures


def _next(loader, step: int) -> dict:
    try:
        return next(loader)
    except StopIteration:  # a loader has no end; and this must not pass for the end of a loop
        raise RuntimeError(f"the data ended before batch {step}") from None


def _data_state(loader: TrainLoader) -> dict:
    """Of the run: what could not be used is counted over all processes."""
    state = loader.state()
    bad_examples = sum(processes.gather("bad examples", state["bad_examples"]))
    return state | {"bad_examples": bad_examples}
