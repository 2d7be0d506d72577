"""How a run ends before its time: signals, and what all processes of a run decide together."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from uta_jax import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """The run was asked to stop, and has saved what it had. Started again, it goes on."""

    exit_code = 75  # EX_TEMPFAIL: try again
    everywhere = True  # all processes raise it, at the same step: none has failed


class Signals:
    """Notes SIGTERM and SIGINT while the context lasts; the second one ends the process at once.

    A signal is looked at between two updates and between two batches of an evaluation, so that one
    in the compiler waits for the compiler.
    """

    def __init__(self):
        self.caught, self._since, self._before = 0, 0.0, {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # others may not
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        name = signal.Signals(number).name
        if self.caught:
            os.write(2, f"\n{name} again: ending at once, unsaved\n".encode())
            os._exit(128 + number)
        self.caught, self._since = number, time.monotonic()
        line = f"\n{name}: saving after this update, then ending; once more ends at once\n"
        os.write(2, line.encode())

    def stopped(self, step: int) -> Stopped:
        """The error to end with, once ``step`` is saved."""
        name = signal.Signals(self.caught).name if self.caught else "a signal at another process"
        waited = f", {time.monotonic() - self._since:.1f} s after it came" if self.caught else ""
        return Stopped(
            f"stopped by {name} after saving step {step}{waited}: give the same command to go on"
        )


class Agreement:
    """Lets every process know, at the same update, that one of them was asked to stop.

    With one process this is that process's own flag. With several, each update is followed by a
    tiny sum over the processes, which nobody waits for: its result is fetched with the metrics of
    that update, one update late, and so is known to all of them at the same step.
    """

    def __init__(self, signals: Signals):
        self._signals, self._several = signals, jax.process_count() > 1
        if self._several:
            devices = np.array(jax.devices())
            mesh = jax.sharding.Mesh(devices, ("all",))
            split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._split, self._shape = split, (devices.size,)
            self._sum = jax.jit(lambda x: x.sum(), out_shardings=whole)

    def ask(self) -> bool | jax.Array:
        """Whether to stop; an array is to be fetched later."""
        asked = bool(self._signals.caught)
        if not self._several:
            return asked
        mine = np.full(jax.local_device_count(), asked, np.int32)
        return self._sum(jax.make_array_from_process_local_data(self._split, mine, self._shape))

    def interruptible(self, batches: Iterable) -> Iterator:
        """``batches``, until a process was asked to stop: then raises Interrupted on all."""
        for batch in batches:
            if bool(self.ask()):
                raise Interrupted
            yield batch


class Interrupted(Exception):
    """An evaluation was left off; the run saves, and ends."""
