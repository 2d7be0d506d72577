"""The figures of a run: fetched one update late, checked, averaged, written, shown."""

import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uta_jax import UserError, ledger, metrics, processes
from uta_jax.evals import is_scored
from uta_jax.ledger import Ledger
from uta_jax.metrics import Meter, Writer, progress_bar


class NotFinite(UserError):
    """Numbers went beyond what is finite, and starting again alone would not help."""

    exit_code = 3


class Plan(NamedTuple):
    """What of a run the log has to know."""

    total: int  # steps
    every: int  # steps between rows
    batch_size: int
    max_bad_steps: int  # in a row
    wandb: str = ""  # project; "": none


class _Pending(NamedTuple):
    step: int
    names: list[str]
    values: jax.Array  # fp32, in the order of the names
    stop: bool | jax.Array
    data_wait_s: float
    bad_examples: int


@jax.jit
def _packed(values: dict) -> jax.Array:
    """Scalars as one array, in the order of their names: fetched in a quarter of the time."""
    return jnp.stack(jax.tree.leaves(values))


class Log:
    """What the loop tells it of each update comes out as rows of ``metrics.jsonl`` and a bar."""

    def __init__(self, workdir: Path, plan: Plan, times: Ledger, step: int, saved: dict):
        """``step``, ``saved``: what the run goes on from; 0 and {} for a fresh one."""
        self.figures: dict[str, float] = {}
        self.stop = False  # whether a process was asked to stop, as of the update settled last
        self.bad_steps, self._in_a_row = saved.get("bad_steps", (0, 0))
        self._plan, self._times, self._pending = plan, times, None
        rows = metrics.read(workdir / "metrics.jsonl")
        scored = any(is_scored(r) and r["step"] == step for r in rows)
        self.has_scores = processes.gather("scores", scored)[0]
        self._carry_on(saved, rows, step)
        self._writer = Writer(workdir, step, plan.wandb) if processes.is_first() else None
        self._meter = Meter(plan.batch_size)
        self._bar = progress_bar(plan.total, step, shown=processes.is_first())

    def _carry_on(self, saved: dict, rows: list[dict], step: int) -> None:
        """Times so far; what came after the checkpoint is lost, unless the run had ended."""
        last = next((row for row in reversed(rows) if "seconds/init" in row), {})
        if "ended" in last and last["step"] == step:
            logged = {phase: last[f"seconds/{phase}"] for phase in ledger.PHASES}
            self._times.carry_on(logged, rest="init")
        else:
            self._times.carry_on(saved.get("seconds", {}))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def _write(self, step: int, values: dict) -> None:
        if self._writer:
            self._writer.write(step, values)

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"bad_steps": [self.bad_steps, self._in_a_row], "seconds": self._times.seconds()}

    def dispatched(
        self, step: int, values: dict, stop: bool | jax.Array, data_wait_s: float, bad_examples: int
    ) -> None:
        """Note the update just dispatched, after settling the one before it."""
        self.settle()
        packed = _packed(values)
        self._pending = _Pending(step, sorted(values), packed, stop, data_wait_s, bad_examples)

    def settle(self) -> None:
        """Wait for the update noted last and count its metrics.

        Raises NotFinite, naming the last good step, once too many in a row were not finite.
        """
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        packed, stop = jax.device_get((done.values, done.stop))
        values = dict(zip(done.names, packed.tolist(), strict=True))
        self.stop = bool(stop)
        self._judge(done.step, values)
        self._meter.add({} if values["bad_step"] else values, done.data_wait_s)
        self._bar.update()
        if done.step % self._plan.every == 0 or done.step == self._plan.total:
            self._write_means(done.step, done.bad_examples)

    def _judge(self, step: int, values: dict[str, float]) -> None:
        """Count a bad update, which changed nothing; stop after too many, or after harm."""
        wild = [name for name, value in values.items() if not math.isfinite(value)]
        if not values["bad_step"]:
            self._in_a_row = 0
            if wild:
                raise NotFinite(
                    f"step {step}: not finite after the update: {', '.join(wild)}; start again, "
                    "from the checkpoint before it, with a lower config.optim.lr"
                )
            return
        self.bad_steps, self._in_a_row = self.bad_steps + 1, self._in_a_row + 1
        about = f"step {step}: not finite: {', '.join(wild)}"
        self.say(f"{about}; the update is left out ({self._in_a_row} in a row)")
        if self._in_a_row >= self._plan.max_bad_steps:
            raise NotFinite(
                f"{about}; {self._in_a_row} in a row (config.train.max_bad_steps). The last good "
                f"one is step {step - self._in_a_row}, nothing was saved since: lower "
                f"config.optim.lr or config.optim.b2; `uta-jax train --replay={step}` shows the "
                "batch"
            )

    def _write_means(self, step: int, bad_examples: int) -> None:
        bad_examples = sum(processes.gather("bad examples", bad_examples))
        means = self._meter.read() | {"bad_examples": bad_examples, "bad_steps": self.bad_steps}
        self.figures |= {name: x for name, x in means.items() if not isinstance(x, list)}
        self._write(step, means | self._seconds())
        shown = {"loss": "{:.4f}", "images_per_s": "{:.0f}", "data_wait_ms": "{:.1f}"}
        shown |= {name: "{}" for name in ("bad_examples", "bad_steps") if means[name]}
        postfix = {name: form.format(means.get(name, math.nan)) for name, form in shown.items()}
        self._bar.set_postfix(postfix, refresh=False)

    def _seconds(self) -> dict[str, float]:
        return {f"seconds/{p}": round(s, 3) for p, s in self._times.seconds().items()}

    def say(self, line: str) -> None:
        """Print a line above the bar, on the first process."""
        if processes.is_first():
            self._bar.write(line)

    def scored(self, step: int, scores: dict[str, float]) -> None:
        """Record the figures of an evaluation."""
        if scores:
            self.figures |= scores
            self._write(step, scores)
            line = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.say(f"step {step}: {line}")

    def pictured(self, step: int, panel: np.ndarray) -> None:
        """Show a panel of pictures, uint8 [h, w, 3], on the boards."""
        if self._writer:
            self._writer.picture(step, "pictures", panel)

    def ended(self, step: int, how: str) -> None:
        """Record where the time went, as the last row, and print it."""
        self._write(step, self._seconds() | {"ended": how})
        self.say(ledger.table(self._times.seconds()))

    @contextmanager
    def aside(self, phase: str):
        """Count the time in this context as ``phase``, and leave it out of the rate."""
        since = time.perf_counter()
        with self._times.of(phase):
            yield
        self._meter.pause(time.perf_counter() - since)
