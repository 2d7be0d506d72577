"""Share of the wall time that the training loop spends outside of the compiled step.

    python tests/benchmarks/loop.py [--step_ms 100] [--steps 200] [--rounds 3] [--json FILE]

The whole of ``uta_jax.train`` runs (loader, transfer, metrics, log, progress bar), on synthetic
photographs of 256 pixels cropped to 64. In the place of the compiled step stands its result after a
sleep of ``--step_ms``: a device that is busy and leaves the CPU alone, as an accelerator does. All
that a turn of the loop takes beyond the sleep is ``outside``; the first turns, which compile and
fill the loader, are left out. The sleep is waited for at once, so what the loop would do while a
device is busy counts, too: an upper bound. Where the machine has other work, waiting for a core
counts as well: ``outside_typical`` is the median turn instead of the mean, ``outside_cpu`` what the
loop's own thread computed. All are shares of the wall time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

from uta_jax import train as loop
from uta_jax.config_files import read_config

ROOT = Path(__file__).parents[2]
WARM = 20  # turns


class Device:
    """Stands for the compiled step: the same state again, and metrics, after a sleep."""

    def __init__(self, compiled, seconds: float):
        self._compiled, self._seconds = compiled, seconds
        self._values = None
        self.calls: list[tuple[float, float]] = []  # (start, end)
        self.busy: list[tuple[float, float]] = []  # the same by this thread's own CPU clock

    def __call__(self, state, frozen, batch):
        """The first update is real, for its metrics."""
        start, start_cpu = time.perf_counter(), time.thread_time()
        if self._values is None:
            state, self._values = self._compiled(state, frozen, batch)
        else:
            time.sleep(self._seconds)
        self.busy.append((start_cpu, time.thread_time()))
        self.calls.append((start, time.perf_counter()))
        return state, self._values

    def shares(self) -> dict[str, float]:
        """Of the wall time of a turn; see the module's docstring."""
        calls, busy = self.calls[WARM:], self.busy[WARM:]
        whole = (calls[-1][0] - calls[0][0]) / (len(calls) - 1)
        gaps, cpu = _gaps(calls), _gaps(busy)
        return {
            "outside": statistics.mean(gaps) / whole,
            "outside_typical": statistics.median(gaps) / whole,
            "outside_cpu": statistics.mean(cpu) / whole,
        }


def _gaps(calls: list[tuple[float, float]]) -> list[float]:
    """From the end of each call to the start of the next."""
    return [after[0] - before[1] for before, after in zip(calls, calls[1:], strict=False)]


def run(step_ms: float, steps: int, batch: int) -> dict[str, float]:
    """Shares of one run."""
    devices, compile_whole = [], loop._compile

    def compile_device(*args):
        devices.append(Device(compile_whole(*args), step_ms / 1000))
        return devices[-1]

    loop._compile = compile_device
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            str(ROOT / "configs/demo.py"),
            [
                "--config.data.source=synthetic", "--config.data.path=", "--config.data.split=",
                f"--config.data.batch_size={batch}", "--config.eval.path=",
                f"--config.train.steps={steps}", f"--config.train.save_every={steps}",
                "--config.train.eval_every=0",
            ],
        )  # fmt: skip
        try:
            loop.train(config, folder)
        finally:
            loop._compile = compile_whole
    return devices[0].shares()


def main() -> None:
    """One line a round, then the median."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step_ms", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="write the figures to this file, too")
    args = parser.parse_args()
    rounds = [run(args.step_ms, args.steps, args.batch_size) for _ in range(args.rounds)]
    found = {"step_ms": args.step_ms}
    for name in rounds[0]:
        found[name] = [round(r[name], 4) for r in rounds]
    print(json.dumps(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
