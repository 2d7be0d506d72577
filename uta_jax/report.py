"""What comes out of a run's folder: pictures, a summary, and the model for other libraries."""

import json
from pathlib import Path

import jax
import matplotlib
import numpy as np

from uta_jax import config as configs
from uta_jax import metrics, processes
from uta_jax.checkpoint import SavedRun, load_run
from uta_jax.data.loader import TrainLoader
from uta_jax.evals import evaluate
from uta_jax.interop.export import export
from uta_jax.interop.files import check_free
from uta_jax.interop.teacher import load_clip
from uta_jax.objectives import (
    by_attention,
    cosine,
    draw_mask,
    run_teacher,
    student_input,
    teacher_tokens,
)
from uta_jax.step import step_key

matplotlib.use("Agg")  # files only: no display is needed

_COLUMNS = 8  # crops in samples.png


def export_run(
    workdir: str | Path,
    fmt: str,
    out: str | Path,
    overwrite: bool = False,
    dtype: str = "float32",
    licence: str = "",
    home: str = "",
) -> None:
    """Export the newest student of ``workdir``; the model card says what the folder knows of it.

    ``licence``: of the weights, for the card. ``overwrite``, ``dtype``, ``home``: as ``export``.
    """
    check_free(Path(out), overwrite)
    run = load_run(workdir)
    config = run.config
    card = {
        "objective": config.objective,
        "steps": run.meta["step"],
        "data": Path(config.data.path).name,
    }
    if run.teacher:
        card |= {f"teacher {key}": value for key, value in run.teacher.provenance.items()}
    scores = [r for r in metrics.read(Path(workdir) / "metrics.jsonl") if "zeroshot/top1" in r]
    if scores and scores[-1]["step"] == run.meta["step"]:
        card[f"zero-shot top-1, {config.eval.split}"] = f"{scores[-1]['zeroshot/top1']:.4f}"
    else:
        card["zero-shot top-1"] = "not measured at this step"
    card["licence"] = licence
    if not processes.is_first():
        return
    tokenizer = run.teacher.tokenizer_file if run.teacher else None
    done = export(run.clip, run.spec, fmt, out, card, overwrite, dtype, tokenizer, home)
    print(f"{out}: {fmt}, {dtype}, re-read and equal; {done}")


def export_model(
    model: str | Path,
    fmt: str,
    out: str | Path,
    overwrite: bool = False,
    dtype: str = "float32",
    licence: str = "",
    home: str = "",
    preset: str = "",
) -> None:
    """Export whatever ``load_clip`` reads, such as another library's checkpoint; else as a run."""
    check_free(Path(out), overwrite)
    found = load_clip(model, preset=preset)
    card = {f"source {key}": value for key, value in found.provenance.items()}
    card["licence"] = licence
    done = export(
        found.params, found.spec, fmt, out, card, overwrite, dtype, found.tokenizer_file, home
    )
    print(f"{out}: {fmt}, {dtype}, re-read and equal; {done}")


def report(workdir: str | Path) -> dict:
    """Write ``samples.png``, ``curves.png`` and ``summary.json`` of a run; prints the summary.

    Uses the figures of ``evaluate`` where it ran on this step, and runs it where it did not.
    """
    workdir = Path(workdir)
    run = load_run(workdir)
    figures = _figures(workdir, run.meta["step"])
    rows = metrics.read(workdir / "metrics.jsonl")
    draw_curves(rows, figures, workdir / "curves.png")
    if run.teacher and run.spec.text:  # else their tokens cannot be compared
        draw_samples(run, workdir / "samples.png")
    summary = summarize(rows, figures)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        share = name.endswith("_top1") or name == "chance"
        shown = f"{value:.2%}" if share else value if isinstance(value, str) else f"{value:.1f}"
        print(f"{name:15} {shown}")
    return summary


def _figures(workdir: Path, step: int) -> dict:
    path = workdir / "evaluate.json"
    if path.exists() and (found := json.loads(path.read_text()))["step"] == step:
        if "zeroshot" in found:
            return found
    return evaluate(workdir, wanted=("zeroshot",))


def summarize(rows: list[dict], figures: dict) -> dict:
    """The figures of a run that one would quote: shares, seconds of training, the median rate."""
    timed = [row for row in rows if "images_per_s" in row]
    summary = {
        f"{name}_top1": figures["zeroshot"][name]["top1"]
        for name in ("teacher", "student", "exported")
        if name in figures["zeroshot"]
    }
    return summary | {
        "chance": figures["zeroshot"]["chance"]["top1"],
        "images_per_s": float(np.median([row["images_per_s"] for row in timed])),
        "train_seconds": sum(row["seconds"] for row in timed),
        "export_dir": figures.get("export_dir", ""),
    }


def draw_curves(rows: list[dict], figures: dict, path: Path) -> None:
    """Loss, cosines, accuracy against the teacher's, gradient norm and speed over the steps."""
    import matplotlib.pyplot as plt

    panels = {
        "loss": ["loss"],
        "cosine with the teacher": ["cos_cls", "cos_patch"],
        "zero-shot top-1": ["zeroshot/top1"],
        "gradient norm": ["grad_norm"],
        "images per second": ["images_per_s"],
        "learning rate": ["lr"],
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=name, marker=".")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    if "teacher" in figures["zeroshot"]:
        axes[0, 2].axhline(
            figures["zeroshot"]["teacher"]["top1"], color="black", ls="--", label="teacher"
        )
    axes[0, 1].legend()
    axes[0, 2].legend()
    axes[0, 2].set_ylim(0, 1)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_samples(run: SavedRun, path: Path) -> None:
    """Training crops, what the student saw of them, its agreement with the teacher by patch."""
    import matplotlib.pyplot as plt

    image_bhwc = _training_crops(run)
    keep_bk = np.asarray(_masks(run, image_bhwc))
    agreement_bgg = _agreement(run, image_bhwc)
    size = run.task.student.patch_size
    shown_bn = np.zeros((len(image_bhwc), run.task.student.tokens), bool)
    np.put_along_axis(shown_bn, keep_bk, True, axis=1)
    shown_bgg = shown_bn.reshape(agreement_bgg.shape)
    seen = np.kron(shown_bgg, np.ones((1, size, size), bool))[..., None]
    titles = ("training crop", "what the student saw", "cosine with the teacher, all patches")
    masked = np.where(seen, image_bhwc, np.uint8(128))
    figure, axes = plt.subplots(3, _COLUMNS, figsize=(1.7 * _COLUMNS, 5.6), layout="constrained")
    for row, (title, pictures) in enumerate(
        zip(titles, (image_bhwc, masked, agreement_bgg), strict=True)
    ):
        for axis, picture in zip(axes[row], pictures, strict=True):
            drawn = axis.imshow(picture, vmin=agreement_bgg.min(), vmax=1, cmap="viridis")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_title(title, loc="left", fontsize=10)
    figure.colorbar(drawn, ax=axes[2], shrink=0.9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _training_crops(run: SavedRun) -> np.ndarray:
    """The first images of the run's first batch, uint8 [b, h, w, 3]."""
    data = run.config.data
    loader = TrainLoader(
        configs.open_data(data),
        batch_size=_COLUMNS,
        seed=run.config.seed,
        image_size=run.task.student.image_size,
        crop_scale=data.crop_scale,
        flip=data.flip,
        reading=configs.reading_of(data),
    )
    batch = next(loader)
    loader.close()
    return batch["image"]


def _masks(run: SavedRun, image_bhwc: np.ndarray) -> jax.Array:
    """The kept patches of the same images in the run's first update."""
    key, batch, teacher = step_key(run.config.seed, 0), run.config.data.batch_size, None
    if by_attention(run.task):
        # A row of the mask depends on its own image alone: any others will do for the rest.
        filled = np.resize(image_bhwc, (batch, *image_bhwc.shape[1:]))
        teacher = run_teacher(run.teacher.params, filled, run.task, attention=True)
    return draw_mask(key, batch, run.task, teacher)[:_COLUMNS]


def _agreement(run: SavedRun, image_bhwc: np.ndarray) -> np.ndarray:
    """Cosine of student and teacher at every patch, both seeing the whole image: [b, g, g]."""
    spec = run.task.student
    all_bn = np.broadcast_to(np.arange(spec.tokens, dtype=np.int32), (len(image_bhwc), spec.tokens))
    params = {"params": run.student["vision"]}
    student = run.task.vit().apply(params, student_input(image_bhwc, run.task))
    teacher = teacher_tokens(run.teacher.params, image_bhwc, jax.numpy.asarray(all_bn), run.task)
    return np.asarray(cosine(student, teacher))[:, 1:].reshape(-1, spec.grid, spec.grid)
