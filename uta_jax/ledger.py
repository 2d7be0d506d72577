"""Where the time of a run went: every second belongs to exactly one phase."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# init: starting and, where the run goes on later, ending
# lost: what killed processes did after their last checkpoint, and had to be done again
PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")


class Ledger:
    """Seconds by phase, over all processes of a run; a phase within another interrupts it."""

    def __init__(self, age_s: float = 0.0):
        """``age_s``: how old the process is already, which is spent on ``init``."""
        self._seconds = dict.fromkeys(PHASES, 0.0) | {"init": age_s}
        self._phase, self._since = "init", time.perf_counter()
        self._age, self._start = age_s, self._since
        self._before = 0.0  # seconds that the processes before this one lived

    @contextmanager
    def kept(self, path: Path) -> Iterator[None]:
        """Keep in the file ``path`` how long the processes of the run have lived, all in all.

        A process that is killed cannot tell how long it worked. So a thread writes that down, ever
        more rarely: 0.5 % of the whole stay unknown at most, or a tenth of a second.
        """
        with suppress(OSError, ValueError):  # none before, or a disk that lost it
            self._before = float(path.read_text())
        path.touch()
        with path.open("r+") as file:  # which empties nothing: a kill may come at once
            done = threading.Event()
            thread = threading.Thread(target=self._keep, args=(file, done), daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    def _keep(self, file, done: threading.Event) -> None:
        ended = False
        while not ended:
            lived = self._before + self._age + time.perf_counter() - self._start
            with suppress(OSError):  # a full disk is told of by what matters more
                os.pwrite(file.fileno(), f"{lived:15.3f}\n".encode(), 0)
            ended = done.is_set()
            done.wait(min(max(0.1, 0.005 * lived), 60.0))

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the time in this context as ``phase``."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        now, before = time.perf_counter(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def seconds(self) -> dict[str, float]:
        """By phase, up to now."""
        self._switch(self._phase)
        return dict(self._seconds)

    def carry_on(self, saved: Mapping[str, float], rest: str = "lost") -> None:
        """Add what went before: by phase as it was ``saved``; what was lived beyond is ``rest``."""
        for phase in PHASES:
            self._seconds[phase] += saved.get(phase, 0.0)
        self._seconds[rest] += max(0.0, self._before - sum(saved.values()))


def table(seconds: Mapping[str, float]) -> str:
    """One line."""
    parts = (f"{phase} {seconds[phase]:.1f}" for phase in PHASES)
    return f"TIME {sum(seconds.values()):.1f} s: {', '.join(parts)}"


def process_age() -> float:
    """Seconds since this process was started, 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
