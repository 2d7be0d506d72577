"""What the folder of a run tells without its checkpoint: configuration, figures, time."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from uta_jax import UserError, metrics
from uta_jax.config_files import load_config
from uta_jax.evals import is_scored
from uta_jax.ledger import PHASES


@dataclass(frozen=True)
class Run:
    """A run by its folder; ``name`` is its own among those of the page."""

    name: str
    number: int  # on the page, from 0
    workdir: Path
    config: ConfigDict
    rows: list[dict]  # of metrics.jsonl
    judged: dict  # of evaluate.json; {} where there is none

    def points(self, figure: str) -> list[tuple[int, float]]:
        """(step, value) of a figure wherever it was recorded and is finite."""
        return [
            (row["step"], row[figure])
            for row in self.rows
            if isinstance(row.get(figure), int | float) and math.isfinite(row[figure])
        ]

    def last(self, figure: str) -> float | None:
        """The last value of a figure; None where it never was recorded."""
        points = self.points(figure)
        return points[-1][1] if points else None

    @property
    def step(self) -> int:
        """The last update that left a figure; 0 where none did."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def ended(self) -> str:
        """complete, stopped, or "" where it runs on or was killed."""
        return self.rows[-1].get("ended", "") if self.rows else ""

    @property
    def seconds(self) -> dict[str, float]:
        """The ledger of time by phase; {} where there is none."""
        timed = [row for row in self.rows if "seconds/init" in row]
        return {phase: timed[-1][f"seconds/{phase}"] for phase in PHASES} if timed else {}

    def scores(self) -> dict[int, dict[str, float]]:
        """Step -> EVALUATOR/FIGURE -> value of the student, by training and by ``evaluate``."""
        found = {row["step"]: row for row in self.rows if is_scored(row)}
        for name, of in self.judged.items():
            if isinstance(of, dict) and "student" in of:
                scores = {f"{name}/{figure}": x for figure, x in of["student"].items()}
                step = self.judged["step"]
                found[step] = found.get(step, {}) | scores
        return dict(sorted(found.items()))

    def of_teacher(self, evaluator: str) -> dict[str, float]:
        """What ``evaluate`` found of the teacher; {} where it did not."""
        found = self.judged.get(evaluator)
        return found.get("teacher", {}) if isinstance(found, dict) else {}


def open_runs(workdirs: list[str | Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
      UserError: a folder twice, or one that is not the workdir of a training run.
    """
    folders = [Path(workdir) for workdir in workdirs]
    twice = [str(path) for path, times in Counter(folders).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice; name each workdir once")
    return [_open(name, number, folders[number]) for number, name in enumerate(_names(folders))]


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, or the whole where that would not tell them apart."""
    last = Counter(path.resolve().name for path in folders)
    return [name if last[name := path.resolve().name] == 1 else str(path) for path in folders]


def _open(name: str, number: int, workdir: Path) -> Run:
    config = load_config(workdir / "config.json")
    rows = metrics.read(workdir / "metrics.jsonl")
    return Run(name, number, workdir, config, rows, _judged(workdir / "evaluate.json"))


def _judged(path: Path) -> dict:
    """What ``evaluate`` wrote; {} where it did not."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "step" not in found:
        raise UserError(f"{path} is damaged: delete it, and run `uta-jax evaluate` again")
    return found
