"""A run's student, or any model, written for other libraries with what is known of it."""

from pathlib import Path

from uta_jax import metrics, processes
from uta_jax.checkpoint import load_run
from uta_jax.interop.export import export
from uta_jax.interop.files import check_free
from uta_jax.interop.teacher import load_clip


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
