"""What takes too long is named, with the stacks of all threads; what does not is left alone."""

import subprocess
import sys
import time
from pathlib import Path

from uta_jax import processes
from uta_jax.watchdog import Watchdog

HANGS = """
import threading, time
from uta_jax.watchdog import Watchdog
def waits_for_ever():
    time.sleep(60)
def the_loop_hangs_here():
    time.sleep(60)
threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog(0.5, "config.train.timeout_s") as watchdog:
    watchdog.at("step 3 (batch 2 of the run)")
    the_loop_hangs_here()
"""


def test_what_hangs_is_ended_with_every_stack_and_its_name_last():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - start < 45
    assert all(name in done.stderr for name in ("the_loop_hangs_here", "waits_for_ever"))
    assert done.stderr.splitlines()[-1].startswith(
        "uta-jax: step 3 (batch 2 of the run) has taken longer than config.train.timeout_s=0.5 s"
    )


def test_every_turn_begins_the_time_anew(monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "end", ended.append)
    with Watchdog(0.8, "key") as watchdog:
        for step in range(6):
            watchdog.at(f"step {step}")
            time.sleep(0.2)
    time.sleep(1.0)  # what comes after it is not watched
    assert not ended
