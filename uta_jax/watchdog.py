"""Ends a run that hangs: what it was at, and where every thread stands."""

import faulthandler
import sys
import threading
import time

from uta_jax import processes


class Watchdog:
    """Watches that nothing named by ``at`` takes longer than ``limit_s`` seconds; a context.

    Else it prints the stacks of all threads and one line that names what took so long, and ends the
    process, and the others of its run, with exit code 1.
    """

    def __init__(self, limit_s: float, key: str):
        self._limit_s, self._key = limit_s, key
        self._what, self._since, self._done = "", time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def at(self, what: str) -> None:
        """The process turns to ``what`` now."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(self._limit_s / 4, 1.0)):
            if time.monotonic() - self._since > self._limit_s:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                processes.end(
                    f"{self._what} has taken longer than {self._key}={self._limit_s:g} s; where "
                    "each thread stands is printed above"
                )
