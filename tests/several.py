"""Starts several processes of one run on this machine, and watches how they end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "faults"
# For JAX on CPUs: programs need not be fast in tests but compiled soon, in a fifth of the time.
COMPILE_SOON = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count={}"


class Job:
    """The processes of one run; all are gone when the context ends."""

    def __init__(
        self,
        folder: Path,
        *argv: str,
        count: int = 2,
        started: Sequence[int] | None = None,
        each: dict[int, dict[str, str]] | None = None,
        devices: int = 1,
    ):
        """Start ``python ARGV`` ``count`` times, or only the numbers in ``started``.

        ``folder``: for what they print, and, beside it, compilations. ``each``: number -> variables
        of that process alone; ``ARGV`` there replaces its arguments.
        """
        folder.mkdir(parents=True)
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{any_port.getsockname()[1]}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "UTA_", "XLA_"))}
        env |= {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, FAULTS))), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{COMPILE_SOON} {DEVICES.format(devices)}",
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
            "JAX_COMPILATION_CACHE_DIR": f"{folder.parent}/xla",
        }  # fmt: skip
        self._folder, self.processes = folder, {}
        for number in range(count) if started is None else started:
            own = {"JAX_PROCESS_ID": str(number)} | (each or {}).get(number, {})
            argv_here = own.pop("ARGV", "").split() or argv
            with (
                self._file(number, "out").open("w") as out,
                self._file(number, "err").open("w") as err,
            ):
                self.processes[number] = subprocess.Popen(
                    [sys.executable, "-u", *argv_here], env=env | own, stdout=out, stderr=err
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _file(self, number: int, kind: str) -> Path:
        return self._folder / f"{number}.{kind}"

    def out(self, number: int = 0) -> str:
        """What a process has printed so far."""
        return self._file(number, "out").read_text()

    def err(self, number: int) -> str:
        """What a process has said on stderr so far."""
        return self._file(number, "err").read_text()

    def last_line(self, number: int) -> str:
        """Of what a process said on stderr."""
        return self.err(number).strip().splitlines()[-1]

    def wait_for(self, words: str, number: int, seconds: float = 240.0) -> None:
        """Until a process has said ``words``; AssertionError where it ends, or is late, without."""
        end = time.monotonic() + seconds
        while words not in self.out(number) + self.err(number):
            gone = self.processes[number].poll() is not None
            if time.monotonic() > end or gone and words not in self.out(number) + self.err(number):
                raise AssertionError(f"process {number} did not say {words!r}: {self.all()}")
            time.sleep(0.05)

    def codes(self, seconds: float = 240.0, *numbers: int) -> list[int]:
        """Exit codes of the processes (or of ``numbers``); AssertionError after ``seconds``."""
        end, found = time.monotonic() + seconds, []
        for number in numbers or self.processes:
            try:
                found.append(self.processes[number].wait(max(end - time.monotonic(), 0.01)))
            except subprocess.TimeoutExpired:
                late = f"process {number} still runs after {seconds:g} s: {self.all()}"
                raise AssertionError(late) from None
        return found

    def send(self, number: int, what: signal.Signals) -> None:
        """A signal to one process."""
        self.processes[number].send_signal(what)

    def all(self) -> str:
        """Everything that was said, for messages."""
        return "".join(
            f"\n--- process {n} ({self.processes[n].poll()})\n{self.out(n)}{self.err(n)}"
            for n in self.processes
        )
