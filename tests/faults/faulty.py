"""A source of pictures some of which do harm to who reads them; workers can import it quickly."""

import os
import resource
import signal
import time

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
        if not os.path.exists(self.beside):
            before, now = time.time(), iter(range(10**9, 0, -3600))
            time.time = lambda: next(now)
            with open(self.beside, "w") as file:
                file.write(str(time.time() < before))
        return image

    def note_limits(self, image):
        """What the process that reads was given."""
        with open(self.beside, "w") as file:
            file.write(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        return image
