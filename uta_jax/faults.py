"""Faults on demand, for tests: ``UTA_FAULT=point:action[:n]`` strikes at the n-th pass (1: first).

Off unless the variable is set. ``POINTS`` is the one list of places; each is a call of ``reach``.
Before it strikes, a fault says so on stderr, so that a test can tell that it happened.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from uta_jax import UserError

POINTS = {
    "start": "before the teacher is loaded",
    "compile": "before the step is compiled",
    "step": "an update was dispatched",
    "eval": "in an evaluation, before its first batch",
    "save.begin": "before the temporary directory of a checkpoint",
    "save.shard": "the first file of an array lies in the temporary directory",
    "save.commit": "all is written, the directory is about to get its name",
    "save.committed": "the directory has its name, but no manifest",
    "save.manifest": "the manifest is written under another name",
    "save.acknowledged": "the manifest has its name",
    "delete.begin": "an old checkpoint is about to be deleted",
    "delete.half": "an old checkpoint is deleted in part",
}


def _raise() -> None:
    raise RuntimeError("a fault that was asked for (UTA_FAULT)")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(9),
    "raise": _raise,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "group": lambda: os.killpg(0, signal.SIGTERM),  # and all that it has started
    "twice": lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)] and None,
    "sleep": lambda: time.sleep(3600),
}


def _parse(text: str) -> tuple[str, str, int]:
    point, _, rest = text.partition(":")
    action, _, count = rest.partition(":")
    if point not in POINTS or action not in ACTIONS or not (count or "1").isdigit():
        raise UserError(
            f"UTA_FAULT={text}: must be POINT:ACTION[:N] with a point of {', '.join(POINTS)} and "
            f"an action of {', '.join(ACTIONS)}"
        )
    return point, action, int(count or 1)


_left: dict[str, int] = {}  # passes of a point until it strikes


def armed(point: str) -> bool:
    """Whether the fault of this process is at ``point``, struck or not."""
    return bool(text := os.environ.get("UTA_FAULT")) and _parse(text)[0] == point


def reach(point: str) -> None:
    """Strike here, if this is the place and the time; else do nothing."""
    if not armed(point):
        return
    text = os.environ["UTA_FAULT"]
    _, action, count = _parse(text)
    _left[text] = _left.get(text, count) - 1
    if _left[text] == 0:
        print(f"UTA_FAULT: {action} at {point} (pass {count})", file=sys.stderr, flush=True)
        ACTIONS[action]()


def reach_once_there(point: str, directory: Path, pattern: str) -> None:
    """Reach ``point`` when a file of ``pattern`` lies in ``directory``; waits in the background."""
    if armed(point):
        arguments = (point, directory, pattern)
        threading.Thread(target=_watch, args=arguments, daemon=True).start()


def _watch(point: str, directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(directory.glob(pattern)):
            return reach(point)
        time.sleep(0.0002)
