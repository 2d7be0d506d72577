"""The processes of a run: where each was started, how they find each other, how they end.

``started`` is the whole life: it finds out from the environment which process this is, calls the
roll, starts JAX's runtime, checks the platform, and lets no process outlive a failure of another.
In a run of one process all of it is idle, and exceptions pass as they are.
"""

import ctypes
import hashlib
import json
import os
import platform as machine
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from uta_jax import UserError, __version__, allocator
from uta_jax.lifeline import END, Lifeline, Member, end_process
from uta_jax.places import Place, find_place
from uta_jax.rollcall import LOOPBACK, call_the_roll

PLATFORMS = ("cpu", "gpu", "tpu", "")
_ECHO_S = 2.0  # in which the line hears of another process's end, if an error comes of that

_line: Lifeline | None = None  # of this process; JAX's runtime, too, is one a process


@contextmanager
def started(
    platform: str = "", start_s: float = 300.0, heartbeat_s: float = 20.0, shutdown_s: float = 60.0
) -> Iterator[None]:
    """All processes of the run within: from the roll call until every one has come to its end.

    With several processes, an exception in this context is printed, told to the others and ends
    all of them at once; without, it passes on. Nested, it does nothing.

    Args:
      platform: one of PLATFORMS: what JAX must run on; "" for whatever there is.
      start_s: longest wait for the other processes at the start.
      heartbeat_s: silence of a process after which it counts as lost.
      shutdown_s: how much later than the first the last may come to its end.

    Raises UserError where the processes do not fit together, or the platform is not there.
    """
    place = Place("nested") if _line is not None else find_place()
    if place.count == 1:
        settle(platform)
        yield
        return
    try:
        _join(place, platform, start_s, heartbeat_s, shutdown_s)
        settle(platform)
        yield
        _part()
    except BaseException as error:
        if not getattr(error, "everywhere", False):
            _fail(error)
        _part()
        raise


def _join(place: Place, platform: str, start_s, heartbeat_s, shutdown_s) -> None:
    """Call the roll, open the line, start JAX's runtime."""
    global _line
    me = Member(place.index, place.count, socket.gethostname(), os.getpid(), code_version())
    _check_loopback(place)
    members, wires = call_the_roll(me, place.coordinator, start_s, say_now)
    _let_us_speak_before_an_abort()
    _line = Lifeline(members, place.index, wires, heartbeat_s, shutdown_s)
    if platform:  # else a process that lacks it would wait for those that have it
        name = {"gpu": "cuda"}.get(platform, platform)
        jax.config.update("jax_platforms", name if platform == "cpu" else f"{name},cpu")
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(start_s) + 1,
        heartbeat_timeout_seconds=int(3 * heartbeat_s) + 10,  # the line knows before
        shutdown_timeout_seconds=int(shutdown_s) + 1,
    )


def _check_loopback(place: Place) -> None:
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) if place.environment == "Slurm" else 1
    if nodes > 1 and place.coordinator.startswith(LOOPBACK):
        raise UserError(
            f"the coordinator {place.coordinator} is loopback, but there are {nodes} nodes"
        )


def _let_us_speak_before_an_abort() -> None:
    """JAX's runtime aborts the moment process 0 is gone: hold that thread until the line spoke.

    SIGABRT's number is 6, and ``sleep(6)`` is what its handler does; if the line has nothing to say
    by then, the abort goes on as ever.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(6, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _part() -> None:
    """Leave, when all have come to the end."""
    global _line
    gather(END, None)
    jax.distributed.shutdown()
    _line.close()
    _line = None


def _fail(error: BaseException) -> None:
    """Print what happened here, tell the others, and end; the interpreter's own end would wait.

    Whatever it was may be the echo of another process's end, which reaches libraries of all kinds
    first, and each has its own exception for it: the line gets the time to say so.
    """
    if _line:
        time.sleep(_ECHO_S)
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    if isinstance(error, UserError):
        code, words = getattr(error, "exit_code", 2), " ".join(str(error).split())
    else:
        words = "".join(traceback.format_exception(error)).rstrip()
    end(words, code if isinstance(code, int) and code else 1)


def end(words: str, code: int = 1) -> NoReturn:
    """End this process now, and with it the run: tell the others, and print ``words`` last."""
    name = f"{_line.members[_line.index]}: " if _line else ""
    if _line:
        _line.fail(f"{name}{words[-20_000:]}", code)
    end_process(f"uta-jax: {name}{words}", code)


def settle(platform: str = "") -> None:
    """Settle what has to be settled before JAX's first thread; for the whole process.

    Several devices made of one CPU run their programs one by one: with programs in flight, a
    collective can wait for a thread that the next program holds, and XLA ends the process.

    Raises UserError where JAX's backend is not ``platform`` ("": any).
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or _line is not None:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Before JAX starts its threads; but only JAX knows whether this is a CPU.
    allocator.keep_all()
    check_platform(platform)
    if jax.default_backend() != "cpu":
        allocator.as_ever()


def check_platform(platform: str) -> None:
    """UserError where JAX's backend is not ``platform``, instead of a slow run on the CPU."""
    try:
        found = jax.default_backend()
        if platform in ("", found):
            return
        jax.devices(platform)
        reason = f"JAX prefers {found}; set JAX_PLATFORMS={platform}"
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
    holders = ", ".join(map(str, _holders())) if platform != "cpu" else ""
    raise UserError(
        f"config.platform={platform}: not what JAX finds on this machine ({reason})"
        + (f"; process {holders} holds an accelerator: end it" if holders else "")
        + "; install its plugin, run where there is one, or change config.platform"
    )


def _holders() -> list[int]:
    """Other processes that have the device file of an accelerator open, as far as one may see."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()).startswith(("/dev/accel", "/dev/vfio/", "/dev/nvidia0")):
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return sorted(found - {os.getpid()})


def refuse_several(command: str) -> None:
    """UserError where this is one of several processes, which ``command`` cannot share out."""
    if (count := find_place().count) > 1:
        raise UserError(
            f"{command}: {count} processes were started, it runs in one: start just one"
        )


# What all know


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _line is None or _line.index == 0


def say(text: str) -> None:
    """Print a line, on process 0 alone."""
    if is_first():
        say_now(text)


def say_now(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def gather(label: str, value) -> list:
    """What every process brings, by number; all must call it, with the same label. JSON values."""
    return [value] if _line is None else _line.gather(label, value)


def agree(label: str, facts: Mapping[str, object]) -> None:
    """Raise UserError naming the process, the fact and both values where one differs.

    Most are right: the odd one is named.
    """
    brought = gather(label, dict(facts))
    for name in facts:
        values = [json.dumps(facts.get(name)) for facts in brought]
        usual = Counter(values).most_common(1)[0][0]
        odd = next((i for i, value in enumerate(values) if value != usual), None)
        if odd is not None:
            raise UserError(
                f"{label}: {_line.members[odd]} has {name} = {values[odd]}, most of the "
                f"{len(values)} processes have {usual}: start all with the same"
            )


def code_version() -> str:
    """What runs here: a digest of the package's source, and the versions beneath it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return (
        f"uta-jax {__version__} ({digest.hexdigest()[:12]}), jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, Python {machine.python_version()}"
    )


def table(mesh: Mesh) -> str:
    """Every process with its host, its devices, and the part of the mesh that they are."""
    rows = [("process", "host", "pid", "devices", *mesh.axis_names)]
    for member in _line.members if _line else [_alone()]:
        own = [(at, d) for at, d in np.ndenumerate(mesh.devices) if d.process_index == member.index]
        if own:
            spans = (
                f"{min(axis)}-{max(axis)}" for axis in zip(*(at for at, _ in own), strict=True)
            )
            devices = f"{len(own)} x {own[0][1].device_kind}"
            rows.append((member.index, member.host, member.pid, devices, *spans))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _alone() -> Member:
    return Member(0, 1, socket.gethostname(), os.getpid(), "")
