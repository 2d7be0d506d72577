"""A source of pictures some of which do harm to who reads them; workers can import it quickly."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pictures import Pictures


class Faulty(Pictures):
    """Reading example `at` does `what`; `beside` is a file that the fault needs or leaves."""

    def __init__(self, n, what="", at=(), beside="", **options):
        super().__init__(n, **options)
        self.what, self.at, self.beside = what, at, str(beside)

    def image(self, index):
        if index in self.at:
            return getattr(self, self.what)(super().image(index))
        return super().image(index)

    def die(self, image):
        """As the kernel does it when memory runs out."""
        os.kill(os.getpid(), signal.SIGKILL)

    def bus_error(self, image):
        os.kill(os.getpid(), signal.SIGBUS)

    def exit(self, image):
        os._exit(3)

    def fail(self, image):
        raise ValueError("three is not five")

    def block(self, image):
        with open(self.beside, "rb") as fifo:  # nobody writes to it
            return fifo.read()

    def wait(self, image):
        while not os.path.exists(self.beside):
            time.sleep(0.01)
        return image

    def turn_back_the_clock(self, image):
        """Once and for all, in the process that reads."""
        with suppress(FileExistsError), open(self.beside, "x") as file:  # one thread alone
            before, now = time.time(), iter(range(10**9, 0, -3600))
            time.time = lambda: next(now)
            file.write(str(time.time() < before))
        return image

    def die_after_a_slow_one(self, image):
        """Of `at`, the first takes long and the others kill who reads them."""
        if image != super().image(self.at[0]):
            self.die(image)
        time.sleep(0.5)
        return image


@dataclass(frozen=True)
class Modules:
    """A job that gives what its process has imported after another job."""

    job: Callable

    def __call__(self, position, index, pixels, note):
        self.job(position, index, pixels, note)
        return sorted(sys.modules)
