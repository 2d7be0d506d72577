"""Kills training runs at every named point and at random times, and checks what they come back to.

    make faults                          # all of it, one process and two
    python tests/faults/harness.py --quick

Each run is killed several times in a row and then left to end. After every kill each acknowledged
checkpoint must verify and hold, bit for bit, what the uninterrupted run had at that step; every
restart must go on from the last acknowledged step; and at the end the parameters, moments, average
and logged figures must be those of the uninterrupted run. A kill at a point that did not happen is
an error; one at a random time that came too late is not counted.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from uta_jax import metrics
from uta_jax.checkpoint import folder, load_params, manifest

HERE = Path(__file__).parent
STEPS, SAVE_EVERY = 8, 2  # as in tiny.py

# Runs: what strikes them, one after the other; "random" is a kill at a random time.
RUNS = (
    ("save.begin:kill", "save.shard:kill", "save.commit:kill", "save.committed:kill",
     "save.manifest:kill", "save.acknowledged:kill", "delete.begin:kill", "random"),
    ("start:kill", "compile:kill", "step:kill:1", "step:kill:2", "eval:kill", "step:kill:3"),
    ("eval:kill", "delete.half:kill", "save.begin:kill", "random"),
    ("save.shard:kill:2", "save.manifest:kill:2", "random", "random"),
    ("save.commit:kill:3", "delete.half:kill", "random"),
    ("save.committed:kill:2", "save.committed:kill", "save.acknowledged:kill:2"),
    ("step:kill:7", "save.shard:kill", "random"),
    ("step:kill:4", "save.manifest:kill", "save.commit:kill", "step:kill:2", "step:kill:1"),
)  # fmt: skip
QUICK = (
    ("save.shard:kill", "save.committed:kill", "save.acknowledged:kill", "delete.half:kill"),
    ("step:kill:3", "save.manifest:kill", "eval:kill", "random"),
)  # fmt: skip
# With two processes: which of them is struck, then the rest. The first does what only one may do.
TWO = (
    ("0 save.shard:kill", "1 step:kill:3", "0 save.commit:kill", "0 save.committed:kill"),
    ("0 save.manifest:kill", "1 random", "0 save.acknowledged:kill", "1 eval:kill"),
    ("0 delete.begin:kill", "1 save.begin:kill", "0 delete.half:kill", "1 compile:kill"),
    ("0 start:kill", "0 step:kill:5", "1 step:kill:6", "0 random"),
    ("1 random", "0 save.begin:kill:2", "1 step:kill:1", "0 random"),
)
TWO_QUICK = (("1 step:kill:3", "0 save.committed:kill"),)


@dataclass
class Tally:
    """What the table shows of one kind of run."""

    tried: int = 0
    survived: int = 0
    most_lost: int = 0  # steps done again
    wrong: int = 0  # arrays or rows that differ from the uninterrupted run
    notes: list[str] = field(default_factory=list)


class Trial:
    """One folder for all runs of so many processes, and the run that nothing befell."""

    def __init__(self, base: Path, processes: int, rng: random.Random):
        self.base, self.processes, self.rng = base / f"{processes}", processes, rng
        self.base.mkdir()
        self.tally = Tally()
        whole = self.base / "whole"
        for folder_name in ("warm", "whole"):  # the first fills the cache of compilations
            start = time.monotonic()
            done = self.start(self.base / folder_name, keep=99)
            out, _ = done.wait()
            if done.codes() != [0] * processes:
                raise SystemExit(f"the uninterrupted run failed:\n{out}")
            self.seconds = time.monotonic() - start
        self.rows = figures(whole)
        steps = folder.acknowledged(whole / "checkpoints")
        self.states = {step: state_of(whole, step) for step in steps}
        if sorted(self.states) != [*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]:
            raise SystemExit(f"the uninterrupted run has saved {sorted(self.states)}")

    def start(
        self, workdir: Path, fault: str = "", struck: int = 0, keep: int = 2, extra: Sequence = ()
    ) -> "Processes":
        """A run in ``workdir``; process ``struck`` has the ``fault``; ``extra`` arguments."""
        command = [
            sys.executable, "-u", "-m", "uta_jax", "train", f"--config={HERE / 'tiny.py'}",
            f"--workdir={workdir}", f"--config.train.keep={keep}",
            f"--config.train.compile_cache={self.base.parent / 'xla'}", *extra,
        ]  # fmt: skip
        path = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "UTA_"))}
        env |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        if self.processes > 1:
            address = f"127.0.0.1:{free_port()}"
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes)}
        envs = [env | {"JAX_PROCESS_ID": str(n)} for n in range(self.processes)]
        if fault and fault != "random":
            envs[struck]["UTA_FAULT"] = fault
        return Processes(command, envs, workdir)

    def run(self, faults: Sequence[str]) -> None:
        """Strike a run with each of ``faults``, then let it end; count what was found."""
        workdir = self.base / re.sub(r"\W+", "-", " ".join(faults))
        acknowledged, reached = 0, 0
        for fault in (*faults, ""):
            struck, _, name = fault.rpartition(" ")
            began = time.monotonic()
            done = self.start(workdir, name, int(struck or 0))
            if name == "random":
                happened = done.kill_after(self.rng.uniform(0.3, 0.8) * self.seconds)
            elif name:
                happened = done.wait_for_fault(int(struck or 0))
            out, error = done.wait()
            resumed = self.check_restart(fault, out, acknowledged)
            if resumed is not None:
                self.check_lost(fault, reached - resumed)
            if not fault:
                self.check_end(workdir, done.codes(), out + error)
                break
            self.tally.tried += happened
            if not happened and name == "random":
                print("  random: the run had ended already", flush=True)
            elif not happened:
                self.note(f"{fault}: did not happen\n{out}{error}")
            steps = self.check_saved(workdir, fault)
            if steps and max(steps) < acknowledged:
                self.note(f"{fault}: acknowledged {acknowledged}, now {max(steps)} is left")
            acknowledged = max(steps, default=0)
            reached = max((row["step"] for row in rows_of(workdir)), default=0)
            self.tally.survived += happened
            took = time.monotonic() - began
            print(f"  {fault:24} at step {reached}, saved {steps}, {took:.1f} s", flush=True)
        shutil.rmtree(workdir)

    def check_restart(self, fault: str, out: str, acknowledged: int) -> int | None:
        """The step that a restart went on from; None where it was struck before it said so."""
        found = re.search(r"RESUMED at step (\d+)|FRESH START", out)
        if not found:
            return None
        resumed = int(found[1] or 0)
        if resumed < acknowledged:
            self.note(f"before {fault}: {acknowledged} was acknowledged, {resumed} resumed")
        return resumed

    def check_lost(self, fault: str, steps: int) -> None:
        """At most one interval, and what ran while its save was being written: another one."""
        self.tally.most_lost = max(self.tally.most_lost, steps)
        if steps > 2 * SAVE_EVERY:
            self.note(f"before {fault}: {steps} steps lost")

    def check_saved(self, workdir: Path, fault: str) -> list[int]:
        """The acknowledged steps; what is in them must be what the uninterrupted run had."""
        checkpoints = workdir / "checkpoints"
        steps = folder.acknowledged(checkpoints)
        for step in steps:
            if bad := manifest.verify(checkpoints / str(step))[0]:
                self.note(f"{fault}: acknowledged step {step} does not verify: {bad}")
            wrong = differing(state_of(workdir, step), self.states[step])
            self.tally.wrong += wrong
            if wrong:
                self.note(f"{fault}: {wrong} arrays of step {step} differ")
        return steps

    def check_end(self, workdir: Path, codes: list[int], said: str) -> None:
        """The end of a run that was struck is that of the one that was not."""
        if codes != [0] * self.processes:
            return self.note(f"{workdir.name}: ended with {codes}:\n{said}")
        self.check_saved(workdir, workdir.name)
        if not manifest.exists(workdir / "checkpoints" / str(STEPS)):
            self.note(f"{workdir.name}: the last step is not saved")
        if figures(workdir) != self.rows:
            self.tally.wrong += 1
            self.note(f"{workdir.name}: figures differ from those of the uninterrupted run")

    def note(self, text: str) -> None:
        """Something that must not be."""
        print(f"FAILED: {text}", flush=True)
        self.tally.notes.append(text)


class Processes:
    """The processes of one run; their words go to files beside the workdir."""

    def __init__(self, command: list[str], envs: list[dict], workdir: Path):
        self._files = [
            [open(f"{workdir}.{n}.{kind}", "w+") for kind in ("out", "err")]  # noqa: SIM115
            for n in range(len(envs))
        ]
        self._all = [
            subprocess.Popen(command, env=env, stdout=out, stderr=err, cwd=HERE.parents[1])
            for env, (out, err) in zip(envs, self._files, strict=True)
        ]

    def wait_for_fault(self, struck: int) -> bool:
        """Whether the fault did strike; the other processes go as well, as a scheduler would."""
        self._all[struck].wait(timeout=240)
        happened = "UTA_FAULT: kill" in self._text(struck, 1)
        self._end()
        return happened and self._all[struck].returncode == -signal.SIGKILL

    def kill_after(self, seconds: float) -> bool:
        """Whether there was something left to kill by then."""
        time.sleep(seconds)
        happened = all(process.poll() is None for process in self._all)
        self._end()
        return happened

    def _end(self) -> None:
        for process in self._all:
            process.kill()

    def wait(self) -> tuple[str, str]:
        """What the first process printed, and what all said on stderr, once all have ended."""
        try:
            for process in self._all:
                process.wait(timeout=240)
        finally:
            self._end()
        error = "".join(self._text(n, 1) for n in range(len(self._all)))
        out = self._text(0, 0)
        for file in (file for pair in self._files for file in pair):
            file.close()
        return out, error

    def codes(self) -> list[int]:
        return [process.returncode for process in self._all]

    def _text(self, process: int, kind: int) -> str:
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


def table(tallies: dict[str, Tally]) -> str:
    """One row for each kind of run."""
    head = f"{'':14}{'kills tried':>12}{'survived':>10}{'most steps lost':>17}{'wrong values':>14}"
    rows = [
        f"{name:14}{t.tried:>12}{t.survived:>10}{t.most_lost:>17}{t.wrong:>14}"
        for name, t in tallies.items()
    ]
    return "\n".join([head, *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten kills only")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only with so many")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    args = parser.parse_args(arguments)
    start, tallies = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="uta_faults.") as base:
        for processes, runs in ((1, QUICK if args.quick else RUNS),
                                (2, TWO_QUICK if args.quick else TWO)):  # fmt: skip
            if args.processes in (None, processes):
                print(f"{processes} process{'es' * (processes > 1)}:", flush=True)
                trial = Trial(Path(base), processes, random.Random(args.seed))
                for faults in runs:
                    trial.run(faults)
                tallies[f"{processes} process{'es' * (processes > 1)}"] = trial.tally
    print(table(tallies), f"\nin {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return int(any(tally.notes for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
