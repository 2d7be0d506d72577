"""The training loop.

Order of one turn, and why:
  1. take the batch that was put on the devices while the last step ran;
  2. dispatch the update, which returns at once;
  3. ask whether the save under way has failed, so that a full disk is told of within a step;
  4. fetch the metrics of the update *before*: it is done by now, and this one keeps the devices
     busy. An update that was not finite changed nothing; too many in a row end the run;
  5. save, where it is due or the run was asked to stop, once the metrics of this very update are
     known. With several processes all learn of the request from the sum that came with an update,
     so all stop after the same one;
  6. evaluate, after saving, so that a fault in an evaluator costs no training.

Restart precedence: (1) the newest checkpoint of the workdir that verifies; (2) a fresh start. The
run prints which; ``config.train.resume`` forbids one of them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from uta_jax import UserError, evals, faults, processes, xla_cache
from uta_jax import config as configs
from uta_jax import mesh as meshes
from uta_jax.checkpoint import Checkpoints, folder
from uta_jax.checkpoint.lock import Lock
from uta_jax.config_files import load_config, save_config
from uta_jax.data.loader import TrainLoader
from uta_jax.data.tokenizer import Tokenizer
from uta_jax.evals.features import Features
from uta_jax.evals.setting import Data, Setting
from uta_jax.interop.export import fitting_formats
from uta_jax.interop.teacher import load_clip, read_spec
from uta_jax.ledger import Ledger
from uta_jax.lifetime import Agreement, Interrupted, Signals
from uta_jax.objectives import OBJECTIVES
from uta_jax.pictures.panels import make_panel
from uta_jax.runlog import Log, Plan
from uta_jax.step import Recipe, TrainState, compile_step, init_state, state_shapes
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
    panel: Callable[[dict], np.ndarray] | None  # of the student's tower
    provenance: dict  # of the teacher; saved with every checkpoint
    signals: Signals
    agreement: Agreement
    times: Ledger
    allow_data_change: bool = False  # go on with other data, seed or batch size than was saved


def train(
    config: ConfigDict, workdir: str | Path, allow_data_change: bool = False, age_s: float = 0.0
) -> dict[str, float]:
    """Train ``config`` in ``workdir``, resuming what stands there; returns the last figures.

    ``allow_data_change``: also where the data, the seed or the batch size is not what it was.
    ``age_s``: seconds that the process has spent before, for the ledger of time.

    Raises UserError for input that does not fit together, before anything is compiled; Stopped
    after a signal, SaveError and NotFinite. Changes how this process allocates memory and, with
    several CPU devices, dispatches (``processes.settle``); of several processes, a failure of one
    ends them all.
    """
    times = Ledger(age_s)
    configs.check(config)
    with processes.started(config.platform, **config.processes):
        return _trained(config, workdir, allow_data_change, times)


def _trained(config: ConfigDict, workdir, allow_data_change: bool, times: Ledger) -> dict:
    xla_cache.use(config.train.compile_cache)
    source = configs.open_data(config.data)
    has_teacher = OBJECTIVES[config.objective].needs_teacher
    with configs.blame("config.teacher.path"):
        spec = read_spec(config.teacher.path) if has_teacher else None
    recipe = configs.make_recipe(config, spec, len(source))
    mesh = meshes.make_mesh(**config.mesh)
    processes.say(processes.table(mesh))
    processes.agree("what to train", _facts(config, recipe, source))
    workdir = make_workdir(workdir)
    c = config.train
    checkpoints = Checkpoints(workdir, c.keep, c.keep_every, awaited=not c.save_async)
    with jax.set_mesh(mesh), Signals() as signals, _alone(workdir, times), checkpoints:
        checkpoints.open(state_shapes(recipe))
        faults.reach("start")
        run = replace(
            prepare(config, recipe, mesh, workdir, signals, times),
            allow_data_change=allow_data_change,
        )
        return _train(run, checkpoints, source)


@contextmanager
def _alone(workdir: Path, times: Ledger) -> Iterator[None]:
    """The one run in ``workdir``; the first process holds the lock for all, and keeps the time."""
    with ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(closing(Lock(workdir)))
            stack.enter_context(times.kept(workdir / "seconds"))
        yield


def _facts(config: ConfigDict, recipe: Recipe, source) -> dict:
    """What every process must have alike."""
    facts = {f"config.{key}": value for key, value in configs.leaves(config).items()}
    return facts | {"steps": recipe.optim.total_steps, "data fingerprint": source.fingerprint()}


def make_workdir(workdir: str | Path) -> Path:
    """Create ``workdir`` if need be; UserError if it has no name or something else stands there."""
    if not str(workdir):
        raise UserError("--workdir= is empty: name a directory")
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; name a directory") from error
    return workdir


def prepare(
    config: ConfigDict, recipe: Recipe, mesh, workdir: Path, signals: Signals, times: Ledger
) -> Run:
    """Load the teacher, place its vision tower on the devices, set up the evaluation."""
    frozen, params, provenance = {}, {}, {}
    if recipe.task.teacher:
        with configs.blame("config.teacher.path"):
            teacher = load_clip(config.teacher.path, recipe.task.teacher.vision.image_size)
        vision = cast(teacher.params["vision"], recipe.task.teacher_dtype)
        frozen = meshes.place(mesh, {"vision": vision})
        params, provenance = teacher.params, teacher.provenance
    agreement = Agreement(signals)
    evaluate = make_evaluator(config, recipe, mesh, params, agreement.interruptible)
    panel = make_panel(config, recipe.task, mesh, frozen)
    return Run(
        config, recipe, mesh, workdir, frozen, evaluate, panel, provenance, signals, agreement,
        times,
    )  # fmt: skip


def cast(params: dict, dtype: str) -> dict:
    """``params`` in another floating point type, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jax.numpy.dtype(dtype)), params)


def make_evaluator(config: ConfigDict, recipe: Recipe, mesh, teacher: dict, watched):
    """The function ``state -> figures`` that the loop calls between updates.

    ``teacher``: its parameters on the host. ``watched``: wraps the batches, so that an evaluation
    can be left off.
    """
    if not config.eval.path:
        return lambda state: {}
    task = recipe.task
    wanted = evals.fitting(evals.check_names(config.eval.names), task.clip)
    data, size = Data(config), config.eval.batch_size
    evals.open_all(data, wanted)
    if "alignment" not in wanted:
        teacher = {name: tree for name, tree in teacher.items() if name != "vision"}  # large

    def evaluate(state: TrainState) -> dict[str, float]:
        faults.reach("eval")
        params = teacher | meshes.fetch(state.ema or state.params)
        features = Features(size, mesh, configs.reading_of(config.data), watched=watched)
        cfg = Setting(config.eval, task.clip, task.teacher, data, features)
        found = evals.measure(wanted, params, teacher, cfg)
        return {
            f"{name}/{figure}": value
            for name, figures in found.items()
            for figure, value in figures.items()
            if not evals.is_detail(figure)
        }

    return evaluate


def _train(run: Run, checkpoints: Checkpoints, source) -> dict[str, float]:
    bad_file = run.workdir / "bad_examples.jsonl"
    loader = make_loader(run, source, bad_file)  # checks the data, reads none yet
    plan = Plan(
        run.recipe.optim.total_steps, run.config.train.log_every, run.config.data.batch_size,
        run.config.train.max_bad_steps, run.config.train.wandb,
    )  # fmt: skip
    try:
        state, saved = _start(run, checkpoints)
        step = int(state.step)
        at = {"step": step, "teacher": run.provenance.get("sha256")}
        processes.agree("what to start from", at)
        if saved:
            _check_same(run, loader, saved)
        _record_config(run, step)
        with Log(run.workdir, plan, run.times, step, saved) as log:
            if saved and _evaluates(run, step) and not log.has_scores:
                _evaluate(run, state, step, log)  # lost to the interruption
                if log.stop:
                    _stop(run, step, log, checkpoints)
            if not saved:
                _picture(run, state, 0, log)
            with run.times.of("step"):
                limit = run.config.train.timeout_s
                with Watchdog(limit, "config.train.timeout_s") as watchdog:
                    _loop(run, state, loader, log, checkpoints, watchdog)
            with log.aside("checkpoint"):
                checkpoints.wait()
            log.ended(plan.total, "complete")
            return log.figures
    finally:
        loader.close()


def make_loader(run: Run, source, bad_file: Path | None) -> TrainLoader:
    """The training batches of a run, from the first."""
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
        bad_file=bad_file,
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
    step, resume = checkpoints.find(), run.config.train.resume
    if step is not None and resume == "never":
        raise UserError(
            f"config.train.resume=never, but {run.workdir} has a checkpoint of step {step}: name "
            "another workdir"
        )
    if step is not None:
        state, saved = checkpoints.restore(run.recipe, run.mesh, step)
        total = run.recipe.optim.total_steps
        done = "; the run is complete, nothing is left to train" if step >= total else ""
        processes.say(f"RESUMED at step {step} of {total} from {run.workdir}{done}")
        return state, saved
    _check_may_start(run, folder.damaged(checkpoints.directory))
    state = init_state(run.recipe, run.mesh)
    count = parameter_overview.count_parameters(state.params)
    fits = ", ".join(fitting_formats(run.recipe.task.clip)) or "no format: see README, Limits"
    about = f"{count:,} parameters to train; exports as {fits}"
    processes.say(f"FRESH START in {run.workdir}: {about}")
    return state, {}


def _check_may_start(run: Run, damaged: list[str]) -> None:
    """Refuse to begin again what has begun before."""
    resume = run.config.train.resume
    if resume == "must":
        raise UserError(
            f"config.train.resume=must, but {run.workdir} has no checkpoint: mend --workdir, or "
            "use config.train.resume=auto"
        )
    if damaged and resume == "auto":
        raise UserError(
            f"{run.workdir}: no checkpoint is whole ({', '.join(damaged)} in checkpoints/"
            f"{folder.QUARANTINE}): put a copy there, or begin anew with config.train.resume=never"
        )


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


def _evaluate(run: Run, state: TrainState, step: int, log: Log) -> None:
    """Unless it is left off, for the run is to stop."""
    log.settle()
    with log.aside("eval"):
        try:
            log.scored(step, run.evaluate(state))
        except Interrupted:
            log.stop = True
    if not log.stop:
        _picture(run, state, step, log)


def _picture(run: Run, state: TrainState, step: int, log: Log) -> None:
    """What the student makes of the same few crops, where it is asked for."""
    if run.panel:
        with log.aside("eval"):
            log.pictured(step, run.panel((state.ema or state.params)["vision"]))


def _save(run: Run, state, loader: TrainLoader, log: Log, checkpoints: Checkpoints) -> int:
    """Begin to save; the step saved."""
    log.settle()
    with log.aside("checkpoint"):
        checkpoints.save(state, _data_state(loader), {"teacher": run.provenance, **log.state()})
    return int(state.step)


def _data_state(loader: TrainLoader) -> dict:
    """Of the run: what could not be used is counted over all processes."""
    state = loader.state()
    return state | {"bad_examples": sum(processes.gather("bad examples", state["bad_examples"]))}


def _next(loader: TrainLoader, step: int) -> dict:
    try:
        return next(loader)
    except StopIteration:  # a loader has no end; and this must not pass for the end of a loop
        raise RuntimeError(f"the data ended before batch {step}") from None


def _stop(run: Run, step: int, log: Log, checkpoints: Checkpoints) -> None:
    with log.aside("checkpoint"):
        checkpoints.wait()
    log.ended(step, "stopped")
    raise run.signals.stopped(step)


def _compile(run: Run, state: TrainState, batch: dict, log: Log):
    """The step as machine code for this very batch."""
    faults.reach("compile")
    start = time.perf_counter()
    with log.aside("compile"), xla_cache.watched() as counts:
        step = compile_step(run.recipe, run.mesh, run.frozen)
        compiled = step.lower(state, run.frozen, batch).compile()
    seconds = time.perf_counter() - start
    processes.say(f"COMPILED in {seconds:.1f} s, {xla_cache.verdict(counts)}")
    return compiled


def _loop(run: Run, state, loader, log: Log, checkpoints, watchdog: Watchdog) -> None:
    """The order of one turn is that of the module's docstring."""
    config, total = run.config.train, run.recipe.optim.total_steps
    update, step = None, int(state.step)
    saved = step
    while step < total:
        watchdog.at(f"step {step + 1} (batch {step} of the run)")
        with run.times.of("data"):
            batch = _next(loader, step)
        update = update or _compile(run, state, batch, log)
        state, values = update(state, run.frozen, batch)
        step += 1
        faults.reach("step")
        checkpoints.poll()
        log.dispatched(step, values, run.agreement.ask(), loader.data_wait_s, loader.bad_examples)
        if log.stop or step % config.save_every == 0 or step == total:
            watchdog.at(f"saving step {step}")
            saved = _save(run, state, loader, log, checkpoints)
        if _evaluates(run, step) and not log.stop:
            watchdog.at(f"the evaluation after step {step}")
            _evaluate(run, state, step, log)
        if log.stop:
            if saved != step:
                _save(run, state, loader, log, checkpoints)
            _stop(run, step, log, checkpoints)
