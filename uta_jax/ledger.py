"""Where the time of a run went: every second belongs to exactly one phase."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# lost: what killed processes did after their last checkpoint, and had to be done again
PHASES = ("init", "compile", "data", "step", "eval", "checkpoint", "lost")


class Ledger:
    """Seconds by phase, over all processes of a run; a phase within another interrupts it."""

    def __init__(self, age_s: float = 0.0):
        """``age_s``: how old the process is already, which is spent on ``init``."""
        self._seconds = dict.fromkeys(PHASES, 0.0) | {"init": age_s}
        self._phase, self._since = "init", time.perf_counter()

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

    def carry_on(self, saved: Mapping[str, float], logged: Mapping[str, float]) -> None:
        """Add what went before: ``saved`` with the checkpoint, ``logged`` last of all.

        ``logged`` may be of work that the checkpoint does not hold: that is lost.
        """
        lost = max(0.0, sum(logged.values()) - sum(saved.values()))
        for phase in PHASES:
            self._seconds[phase] += saved.get(phase, 0.0)
        self._seconds["lost"] += lost


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
