"""What a report leaves in the folder of each run, to be quoted, mailed or looked at by itself."""

import json
from pathlib import Path

import matplotlib
import numpy as np

from uta_jax.data.files import output
from uta_jax.pictures.crops import Crops
from uta_jax.report import figures
from uta_jax.report.runs import Run

matplotlib.use("Agg")  # files only: no display is needed

ZEROSHOT = "zeroshot/top1"


def write_summary(run: Run) -> None:
    """``summary.json``: the figures one would quote."""
    with output(run.workdir / "summary.json") as file:
        file.write(json.dumps(figures.summary(run), indent=2) + "\n")


def draw_curves(run: Run) -> None:
    """``curves.png``: the curves of the page, and zero-shot accuracy against the teacher's."""
    import matplotlib.pyplot as plt

    panels = figures.CURVES | {"zero-shot top-1": ZEROSHOT}
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    for axis, (title, name) in zip(axes.flat, panels.items(), strict=True):
        points = run.points(name)
        axis.plot(*zip(*points, strict=True) if points else ([], []), label="student", marker=".")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    if teacher := run.of_teacher("zeroshot"):
        axis.axhline(teacher["top1"], color="black", ls="--", label="teacher")
    axis.set_ylim(0, 1)
    axis.legend()
    figure.savefig(run.workdir / "curves.png", dpi=100)
    plt.close(figure)


def draw_samples(found: Crops, workdir: Path) -> None:
    """``samples.png``: a row of pictures for every kind, a column for every training crop."""
    import matplotlib.pyplot as plt

    rows, columns = len(found.rows), len(found.rows[0].pictures)
    size = (1.6 * columns, 1.85 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for row, kind in enumerate(found.rows):
        for axis, pixels in zip(axes[row], kind.pictures, strict=True):
            axis.imshow(np.asarray(pixels), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_title(kind.title, loc="left", fontsize=10)
    figure.supxlabel(found.note, fontsize=9, x=0.01, ha="left")
    figure.savefig(workdir / "samples.png", dpi=100)
    plt.close(figure)
