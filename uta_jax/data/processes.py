"""Worker processes: how they are started, what they share with this process, how they end.

One interpreter is started without JAX. It reads the job and forks the workers, which share its
memory (a large index is held once). A worker writes pixels into memory shared with this process and
sends back the little that is left. Its death is the end of its socket; its stack comes through a
pipe. Nothing is written to /tmp or /dev/shm and no lock is shared, so a killed worker leaves
nothing behind and holds up nobody.
"""

import faulthandler
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np

from uta_jax import UserError, allocator

SLOTS = 3  # batches under way at once
# What each worker is doing, in shared memory, so that its last words survive it.
_DOING = np.dtype(
    [("busy", "i8"), ("position", "i8"), ("index", "i8"), ("since", "f8"), ("key", "S224")]
)

# job(position, index, pixels, note) -> result. It writes into `pixels` (one row of the batch) and
# calls note(key) once it knows the example's name. Picklable for processes.
Job = Callable[[int, int, np.ndarray, Callable[[str], None]], Any]


class Chunk(NamedTuple):
    """Consecutive rows of one batch: what a worker is given at a time."""

    slot: int
    first: int  # row
    places: list[tuple[int, int]]  # (position, index)


def run_chunk(job: Job, pixels: np.ndarray, doing: np.ndarray, chunk: Chunk) -> list:
    """The job on every row of a chunk; errors name the example."""

    def note(key: str) -> None:
        doing["key"] = key.encode("utf-8", "replace")

    results = []
    for row, (position, index) in enumerate(chunk.places, chunk.first):
        doing["key"], doing["since"], doing["busy"] = b"", time.monotonic(), True
        doing["position"], doing["index"] = position, index
        try:
            results.append(job(position, index, pixels[chunk.slot, row], note))
        except UserError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise RuntimeError(f"{example(doing[0])}: {kind}: {error}") from error
    doing["busy"] = False
    return results


def example(doing: np.void) -> str:
    """How messages call what a worker is at; its key is known once the example has been read."""
    key = doing["key"].decode("utf-8", "replace")
    place = f"example {doing['index']} of the data, position {doing['position']} of the run"
    return f"{key!r} ({place})" if key else place


# Shared memory


def _shared_memory(shape: tuple[int, ...], count: int):
    """(file, mmap) without a name: nothing to clean up, and no part of a small /dev/shm."""
    size = SLOTS * int(np.prod(shape)) + _DOING.itemsize * count
    with ExitStack() as stack:
        try:
            linux = hasattr(os, "memfd_create")
            fd = os.memfd_create("batches") if linux else None
            file = stack.enter_context(
                open(fd, "r+b", buffering=0) if linux else tempfile.TemporaryFile(buffering=0)
            )
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # now, or it would be a SIGBUS later
            else:
                file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(
                f"data.workers={count} needs {size / 2**20:.1f} MB of shared memory: "
                f"{error.strerror}; lower data.batch_size, raise the limit, or use threads "
                "(data.workers=0)"
            ) from None
        stack.pop_all()
        return file, memory


def arrays(shape: tuple[int, ...], count: int, memory) -> tuple[np.ndarray, np.ndarray]:
    """The slots of pixels and the workers' records, in `memory` where it is given."""
    if memory is None:
        return np.zeros((SLOTS, *shape), np.uint8), np.zeros(count, _DOING)
    doing = np.frombuffer(memory, _DOING, count)  # first, where it is aligned
    pixels = np.frombuffer(memory, np.uint8, SLOTS * int(np.prod(shape)), doing.nbytes)
    return pixels.reshape(SLOTS, *shape), doing


# Processes, seen from here


class Processes:
    """The interpreter that forks the workers, and a socket and a pipe to each of them."""

    def __init__(self, job: Job, shape: tuple[int, ...], count: int):
        """Start `count` workers on `job`.

        Raises:
          UserError: too little memory, too many open files, a job that cannot be pickled.
        """
        self._lock, self._conns, self._stacks, theirs = threading.Lock(), [], [], []
        file, self.memory = _shared_memory(shape, count)
        try:
            self._control, far = Pipe()
            theirs.append(far)
            for _ in range(count):
                for ours, duplex in ((self._conns, True), (self._stacks, False)):
                    near, far = Pipe(duplex)
                    ours.append(near)
                    theirs.append(far)
            self._template = _start([far.fileno() for far in theirs], file.fileno(), shape)
        except OSError as error:
            raise UserError(
                f"data.workers={count}: {error.strerror}; lower data.workers, or raise the limit "
                "(of open files: `ulimit -n`)"
            ) from None
        finally:
            file.close()
            for far in theirs:
                far.close()
        self.pids = self._hand_over(job)

    def _hand_over(self, job: Job) -> list[int]:
        try:
            self._control.send(job)
            answer = self._control.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._template.wait()
            raise RuntimeError(f"data workers could not be started (exit code {code})") from None
        except (AttributeError, TypeError, ValueError) as error:  # what pickle raises
            self.stop()
            raise UserError(
                f"data.workers: the source cannot be sent to processes ({error}); use threads "
                "(data.workers=0)"
            ) from None
        if isinstance(answer, str):
            self.stop()
            raise UserError(
                f"data.workers: processes cannot read the source ({answer}); define it in a module "
                "that can be imported, or use threads (data.workers=0)"
            )
        return answer

    def run(self, n: int, doing: np.ndarray, chunk: Chunk) -> list:
        """Have worker n run a chunk; what goes wrong there is raised here."""
        try:
            self._conns[n].send(chunk)
            kind, answer = self._conns[n].recv()
        except (EOFError, OSError):
            raise UserError(self._death(n, doing[n])) from None
        if kind == "results":
            return answer
        if kind == "mistake":
            raise UserError(answer)
        message, trace = answer
        raise RuntimeError(f"{self.name(n)}, {message}") from _RemoteError(trace)

    def name(self, n: int) -> str:
        """How messages call worker n."""
        return f"data worker {n} (pid {self.pids[n]})"

    def _death(self, n: int, doing: np.void) -> str:
        code = None
        with self._lock, suppress(EOFError, OSError):
            self._control.send(n)
            if self._control.poll(5):
                code = self._control.recv()
        text = f"{self.name(n)} {_cause(code)}; it was at {example(doing)}"
        stack = self._last_words(n, 0)
        return f"{text}, in {stack}" if stack else text

    def stack(self, n: int) -> str:
        """Where worker n is, asked of it now."""
        self._last_words(n, 0)
        with suppress(ProcessLookupError):
            os.kill(self.pids[n], signal.SIGUSR1)
        return self._last_words(n, 2) or "an unknown place"

    def _last_words(self, n: int, seconds: float) -> str:
        with suppress(EOFError, OSError):
            if self._stacks[n].poll(seconds):
                time.sleep(0.05)  # faulthandler writes piece by piece
                return frames(os.read(self._stacks[n].fileno(), 65536).decode())
        return ""

    def stop(self) -> None:
        """End the workers: with this end of the socket, the other interpreter kills them."""
        self._control.close()
        try:
            self._template.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._template.kill()
            self._template.wait()

    def close(self) -> None:
        """Close what is open, once no thread uses it any more."""
        for conn in (*self._conns, *self._stacks):
            conn.close()


class _RemoteError(Exception):
    """A traceback of another process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


_SIGNALS = {
    signal.SIGKILL: "most likely out of memory: lower data.workers or data.batch_size",
    signal.SIGBUS: "shared memory or a file it was reading shrank or ran out: check free memory "
    "and disks, or lower data.workers",
}


def _cause(code: int | None) -> str:
    if code is None:
        return "ended, and its exit status is not known"
    if code >= 0:
        return f"ended with exit code {code}"
    reason = _SIGNALS.get(-code, "a fault in native code; `uta-jax data verify` finds such files")
    return f"was killed by signal {-code} ({signal.Signals(-code).name}), {reason}"


def _start(fds: list[int], memory: int, shape: tuple[int, ...]) -> subprocess.Popen:
    """The interpreter: our import path, one thread for every numerical library, no accelerator."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    code = "from uta_jax.data.processes import template; template()"
    argv = [sys.executable, "-P", "-c", code, json.dumps([fds, memory, shape])]
    environment = os.environ | one | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(argv, pass_fds=[*fds, memory], env=environment)


# Stacks, innermost frame first

_MACHINERY = r"uta_jax/data/(workers|processes)\.py|/threading\.py|<string>"


def frames(dump: str, most: int = 8) -> str:
    """A dump of faulthandler on one line."""
    lines = [line.strip() for line in dump.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if not re.search(_MACHINERY, line)]
    return " < ".join((own or lines)[:most])


# Processes, seen from inside


def template() -> None:
    """The interpreter that forks the workers and lives as long as this process's end is open."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when its workers end
    allocator.keep_blocks()
    fds, memory, shape = json.loads(sys.argv[1])
    control, pairs = Connection(fds[0]), list(zip(fds[1::2], fds[2::2], strict=True))
    try:
        job = control.recv()
    except EOFError:
        return
    except Exception as error:
        control.send(f"{type(error).__name__}: {error}")
        return
    pixels, doing = arrays(tuple(shape), len(pairs), mmap.mmap(memory, 0))
    pids = []
    for n, (conn, dump) in enumerate(pairs):
        pids.append(os.fork())
        if not pids[-1]:
            os.close(fds[0])
            for fd in (fd for pair in pairs[n + 1 :] for fd in pair):
                os.close(fd)
            _work(Connection(conn), dump, job, pixels, doing[n : n + 1])
        os.close(conn)
        os.close(dump)
    _keep(control, pids)


def _keep(control: Connection, pids: list[int]) -> None:
    """Answer how a worker ended; at the end, end all."""
    codes: dict[int, int] = {}  # asked for again with every chunk that a dead worker gets
    with suppress(EOFError, OSError):
        control.send(pids)
        while True:
            pid = pids[control.recv()]
            if pid not in codes:
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            control.send(codes[pid])
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)


def _work(conn: Connection, dump: int, job: Job, pixels: np.ndarray, doing: np.ndarray) -> None:
    """A worker's life; it does not return."""
    faulthandler.enable(dump, all_threads=False)
    faulthandler.register(signal.SIGUSR1, dump, all_threads=False)
    code = 1
    try:
        while True:
            conn.send(_answer(job, pixels, doing, conn.recv()))
    except (EOFError, OSError):  # the trainer has gone
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(job: Job, pixels: np.ndarray, doing: np.ndarray, chunk: Chunk) -> tuple[str, Any]:
    try:
        return "results", run_chunk(job, pixels, doing, chunk)
    except UserError as error:
        return "mistake", str(error)
    except Exception as error:
        return "error", (str(error), traceback.format_exc())
