"""Kills training runs at every named point and at random times, and checks what they come back to.

    make faults                          # all of it, one process and two; QUICK=1: a part
    python tests/faults/harness.py --quick --processes=2

Each run is killed several times in a row and then left to end. Of two processes one is killed, and
the other must end by itself within 30 s, or both are. After every kill each acknowledged checkpoint
must verify and hold, bit for bit, what the uninterrupted run had at that step; every restart must
go on from the last acknowledged step. At most one interval of steps is lost where the loop awaits
its saves, as in every other run; else those that ran beside the next save as well, and no more than
another interval. At the end the parameters, moments, average and logged figures must be those of
the uninterrupted run. A kill at a point that did not happen is an error; one at a random time that
came too late is not counted.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from several import COMPILE_SOON, DEVICES

from uta_jax import metrics
from uta_jax.checkpoint import folder, load_params, manifest

HERE = Path(__file__).parent
STEPS, SAVE_EVERY = 12, 3  # as in tiny.py
TO_END_S = 30  # for a process whose peer was killed

# Runs: where they are struck, one time after the other; "random" is a kill at a random time.
ONE = (
    ("save.begin", "save.shard", "save.commit", "save.committed", "save.manifest"),
    ("save.acknowledged", "delete.begin", "eval", "random"),
    ("start", "compile", "step:1", "step:2", "eval", "delete.half"),
    ("save.shard:2", "save.manifest:2", "random", "random"),
    ("save.commit:3", "delete.half", "step:1", "random"),
    ("save.committed:2", "save.committed", "save.acknowledged:2"),
    ("step:7", "save.shard", "step:4", "save.begin", "random"),
)
ONE_QUICK = (
    ("save.shard", "save.committed", "eval", "delete.half"),
    ("step:4", "save.manifest", "random"),
)
# Of two, who is struck: the first, which does what only one may do, the second, or both.
TWO = (
    ("0 save.shard", "1 step:5", "0 save.commit", "both save.committed", "0 save.manifest"),
    ("0 save.acknowledged", "1 eval", "both step:2", "0 delete.half", "1 random"),
    ("0 delete.begin", "1 save.begin", "1 compile", "0 step:1", "both random"),
    ("0 start", "both step:4", "1 step:6", "both save.shard", "0 random"),
    ("1 save.begin:2", "0 eval", "0 save.commit", "both random", "1 random"),
)
TWO_QUICK = (("1 step:5", "0 save.committed", "both random"),)


@dataclass
class Kill:
    """One kill, and what its restart showed."""

    who: str  # of two processes: 0, 1 or both
    point: str
    processes: int
    awaited: bool  # its saves, by the loop
    survived: bool = False
    lost: int = 0  # steps done again
    wrong: int = 0  # arrays or rows that differ from the uninterrupted run
    ended_s: float = 0.0  # until the process that was not killed had ended

    @property
    def beside(self) -> int:
        """Of the steps lost, those beyond one interval: they ran beside the next save."""
        return max(0, self.lost - SAVE_EVERY)


class Trial:
    """One folder for all runs of so many processes, and the run that nothing befell."""

    def __init__(self, base: Path, processes: int, seed: int = 0):
        self.base, self.processes, self.rng = base / f"{processes}", processes, random.Random(seed)
        self.base.mkdir()
        self.awaited = False  # whether the run that goes on awaits its saves
        self.kills: list[Kill] = []
        self.failures: list[str] = []
        whole = self.base / "whole"
        done = self.start(whole, extra=["--config.train.save_every=1", "--config.train.keep=99"])
        done.wait_for(0, "FRESH START")
        start = time.monotonic()
        out, error = done.wait()
        if done.codes() != [0] * processes:
            raise SystemExit(f"the uninterrupted run failed:\n{out}{error}")
        compiled = float(re.search(r"COMPILED in ([\d.]+) s", out)[1])
        self.seconds = time.monotonic() - start - compiled  # from then on it is in the cache
        self.rows = figures(whole)
        steps = folder.acknowledged(whole / "checkpoints")
        self.states = {step: state_of(whole, step) for step in steps}
        if sorted(self.states) != [*range(1, STEPS + 1)]:
            raise SystemExit(f"the uninterrupted run has saved {sorted(self.states)}")

    def start(
        self, workdir: Path, fault: str = "", struck: int = 0, extra: Sequence[str] = ()
    ) -> "Processes":
        """A run in ``workdir``; process ``struck`` has the ``fault``; ``extra`` arguments."""
        command = [
            sys.executable, "-u", "-m", "uta_jax", "train", f"--config={HERE / 'tiny.py'}",
            f"--workdir={workdir}", f"--config.train.compile_cache={self.base.parent / 'xla'}",
            f"--config.train.save_async={not self.awaited}", *extra,
        ]  # fmt: skip
        path = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "UTA_"))}
        env |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = f"{COMPILE_SOON} {DEVICES.format(2)}"
        if self.processes > 1:
            address = f"127.0.0.1:{free_port()}"
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes)}
        numbers = range(self.processes)  # one process alone must not be told its number
        envs = [env | ({"JAX_PROCESS_ID": str(n)} if len(numbers) > 1 else {}) for n in numbers]
        if fault:
            envs[struck]["UTA_FAULT"] = fault
        return Processes(command, envs, workdir)

    def run(self, strikes: Sequence[str], awaited: bool) -> Iterator[str]:
        """Strike a run at each of ``strikes``, then let it end; note what was found."""
        self.awaited = awaited
        workdir = self.base / re.sub(r"\W+", "-", " ".join(strikes))
        pending: list[Kill] = []  # those that no restart has come back from yet
        acknowledged, reached = 0, 0
        for strike in strikes:
            kill, out = self.strike(workdir, strike)
            pending = self.check_restart(pending, out, acknowledged, reached)
            if kill is None:
                continue
            self.kills.append(kill)
            pending.append(kill)
            steps, kill.wrong = self.check_saved(workdir, strike)
            if max(steps, default=0) < acknowledged:
                self.fail(f"{strike}: acknowledged {acknowledged}, now {steps} are left")
            acknowledged = max(steps, default=0)
            reached = max((row["step"] for row in rows_of(workdir)), default=0)
            yield f"at step {reached}, saved {steps}"
        done = self.start(workdir)
        out, error = done.wait()
        last = pending[-1] if pending else None
        if self.check_restart(pending, out, acknowledged, reached):
            self.fail(f"{workdir.name}: the last start did not go on:\n{out}{error}")
        wrong = self.check_end(workdir, done.codes(), out + error)
        if last:
            last.wrong += wrong
        shutil.rmtree(workdir)

    def strike(self, workdir: Path, strike: str) -> tuple[Kill | None, str]:
        """Start and kill; None for a random time that came too late. And what was printed."""
        who, _, point = strike.rpartition(" ")
        kill, first = Kill(who, point, self.processes, self.awaited), 1 if who == "1" else 0
        if point == "random":
            done = self.start(workdir)
            done.wait_for(0, "RESUMED|FRESH START")
            happened = done.wait_random(self.rng.uniform(0, 0.6) * self.seconds)
            done.kill(range(self.processes) if who == "both" else [first])
        else:
            name, _, count = point.partition(":")
            done = self.start(workdir, f"{name}:kill:{count or 1}", first)
            happened = done.wait_for_fault(first)
            if who == "both":
                done.kill(range(self.processes))
        kill.ended_s = done.wait_for_end()
        out, error = done.wait()
        if kill.ended_s > TO_END_S:
            self.fail(f"{strike}: the other had to be killed after {kill.ended_s:.0f} s\n{error}")
        if happened and 0 in done.codes():
            self.fail(f"{strike}: exit codes {done.codes()}\n{error}")
        if not happened and point != "random":
            self.fail(f"{strike}: did not happen\n{out}{error}")
        return (kill if happened else None), out

    def check_restart(self, pending: list, out: str, acknowledged: int, reached: int) -> list:
        """R1: the restart goes on from the last acknowledged step. Returns who still waits."""
        found = re.search(r"RESUMED at step (\d+)|FRESH START", out)
        if not found or not pending:
            return pending
        resumed = int(found[1] or 0)
        if resumed < acknowledged:
            self.fail(f"{pending[-1]}: {acknowledged} was acknowledged, {resumed} resumed")
        for kill in pending:
            kill.survived = resumed >= acknowledged and not kill.wrong
        pending[0].lost = reached - resumed
        if pending[0].lost > (1 if self.awaited else 2) * SAVE_EVERY:
            self.fail(f"{pending[0]}: more is lost than may be")
        return []

    def check_saved(self, workdir: Path, strike: str) -> tuple[list[int], int]:
        """The acknowledged steps, and in how many arrays they are not as the uninterrupted run's.

        Each must verify.
        """
        checkpoints, wrong = workdir / "checkpoints", 0
        steps = folder.acknowledged(checkpoints)
        for step in steps:
            if bad := manifest.verify(checkpoints / str(step))[0]:
                self.fail(f"{strike}: acknowledged step {step} does not verify: {bad}")
            wrong += differing(state_of(workdir, step), self.states[step])
        if wrong:
            self.fail(f"{strike}: {wrong} arrays of steps {steps} differ")
        return steps, wrong

    def check_end(self, workdir: Path, codes: list[int], said: str) -> int:
        """R7, R9: the end of a run that was struck is that of the one that was not."""
        if codes != [0] * self.processes:
            self.fail(f"{workdir.name}: ended with {codes}:\n{said}")
            return 1
        _, wrong = self.check_saved(workdir, workdir.name)
        if not manifest.exists(workdir / "checkpoints" / str(STEPS)):
            self.fail(f"{workdir.name}: the last step is not saved")
        if figures(workdir) != self.rows:
            wrong += 1
            self.fail(f"{workdir.name}: figures differ from those of the uninterrupted run")
        return wrong

    def fail(self, text: str) -> None:
        """Something that must not be."""
        print(f"FAILED: {text}", flush=True)
        self.failures.append(text)


class Processes:
    """The processes of one run; their words go to files beside the workdir."""

    def __init__(self, command: list[str], envs: list[dict], workdir: Path):
        self.began = time.monotonic()
        self._files = [
            [open(f"{workdir}.{n}.{kind}", "w+") for kind in ("out", "err")]  # noqa: SIM115
            for n in range(len(envs))
        ]
        self._all = [
            subprocess.Popen(  # each with a group of its own, for signals to a group
                command, env=env, stdout=out, stderr=err, cwd=HERE.parents[1], process_group=0
            )
            for env, (out, err) in zip(envs, self._files, strict=True)
        ]

    def wait_for(self, process: int, pattern: str) -> None:
        """Until that process has printed it, or is no more."""
        while self._all[process].poll() is None:
            if re.search(pattern, self.text(process, 0)):
                return
            time.sleep(0.02)

    def wait_random(self, seconds: float) -> bool:
        """Whether all still run after so long."""
        time.sleep(seconds)
        return all(process.poll() is None for process in self._all)

    def wait_for_fault(self, struck: int) -> bool:
        """Whether that process was struck."""
        self._all[struck].wait(timeout=240)
        happened = "UTA_FAULT: kill" in self.text(struck, 1)
        return happened and self._all[struck].returncode == -signal.SIGKILL

    def kill(self, which: Sequence[int]) -> None:
        for process in which:
            self._all[process].kill()

    def wait_for_end(self) -> float:
        """Seconds until those left have ended by themselves; after TO_END_S they are killed."""
        since = time.monotonic()
        while any(process.poll() is None for process in self._all):
            if time.monotonic() - since > TO_END_S:
                self.kill(range(len(self._all)))
            time.sleep(0.05)
        return time.monotonic() - since

    def wait(self) -> tuple[str, str]:
        """What the first process printed, and what all said on stderr, once all have ended."""
        try:
            for process in self._all:
                process.wait(timeout=240)
        finally:
            self.kill(range(len(self._all)))
        self.seconds, self.ended = time.monotonic() - self.began, time.time()
        error = "".join(self.text(n, 1) for n in range(len(self._all)))
        out = self.text(0, 0)
        for file in (file for pair in self._files for file in pair):
            file.close()
        return out, error

    def codes(self) -> list[int]:
        return [process.returncode for process in self._all]

    def text(self, process: int, kind: int) -> str:
        """What a process has said up to now: on stdout (0) or stderr (1)."""
        return Path(self._files[process][kind].name).read_text()


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def rows_of(workdir: Path) -> list[dict]:
    return [row for row in metrics.read(workdir / "metrics.jsonl") if "ended" not in row]


def figures(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock said."""
    clocks = re.compile(r"seconds|images_per_s|data_wait")
    return [{k: v for k, v in row.items() if not clocks.match(k)} for row in rows_of(workdir)]


def state_of(workdir: Path, step: int) -> dict:
    """All arrays of a checkpoint."""
    return {item: load_params(workdir, item, step) for item in ("params", "opt", "ema")}


def differing(one, other) -> int:
    """How many arrays differ in a bit."""
    return sum(
        not np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def table(kills: Sequence[Kill]) -> str:
    """One row for each kind of kill, then the sums."""
    kinds = defaultdict(list)
    for kill in kills:
        kinds[str(kill.processes), kill.who, kill.point.partition(":")[0]].append(kill)
    head = ("processes", "killed", "point", "tried", "survived", "lost steps", "beside a save",
            "wrong", "other ended in s")  # fmt: skip
    rows = [head, *((*kind, *_sums(of)) for kind, of in kinds.items())]
    for name, awaited in (("saves awaited", True), ("saves beside steps", False)):
        rows.append((name, "", "", *_sums([k for k in kills if k.awaited == awaited])))
    rows.append(("all", "", "", *_sums(kills)))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _sums(kills: Sequence[Kill]) -> tuple:
    alone = max((k.ended_s for k in kills if k.who in ("0", "1")), default=None)
    return (
        len(kills), sum(k.survived for k in kills), max((k.lost for k in kills), default=0),
        max((k.beside for k in kills), default=0), sum(k.wrong for k in kills),
        "" if alone is None else f"{alone:.1f}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each kill, and the table; 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part, in less than 5 minutes")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only with so many")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    runs = {1: ONE_QUICK, 2: TWO_QUICK} if args.quick else {1: ONE, 2: TWO}
    runs = {n: of for n, of in runs.items() if args.processes in (None, n)}
    total, trials = sum(len(run) for of in runs.values() for run in of), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="uta_faults.") as base:
        for processes, of in runs.items():
            print(f"{processes} process(es): the run that nothing befalls ...", flush=True)
            trials.append(Trial(Path(base), processes, args.seed))
            for number, run in enumerate(of):
                for found in trials[-1].run(run, awaited=number % 2 == 1):
                    done, kill = sum(len(trial.kills) for trial in trials), trials[-1].kills[-1]
                    at = f"{done} of {total}, {(time.monotonic() - start) / 60:.1f} min"
                    print(f"[{at}] {processes}: {kill.who} {kill.point}: {found}", flush=True)
    print(table([kill for trial in trials for kill in trial.kills]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (time.monotonic() - start) / 60, (used.ru_utime + used.ru_stime) / 60
    print("in {:.1f} minutes, {:.1f} of one core".format(*minutes), flush=True)
    return int(any(trial.failures for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
