"""Evaluators: what a model can do, measured on data it did not train on."""

import json
from pathlib import Path

import numpy as np

from uta_jax import UserError
from uta_jax.checkpoint import SavedRun, load_run
from uta_jax.config import reading_of
from uta_jax.data.files import output
from uta_jax.data.sources import open_source
from uta_jax.evals.zeroshot import ZeroShot
from uta_jax.interop.export import hf_features


def evaluate(workdir: str | Path, exported: str = "", json_file: str = "") -> dict:
    """Zero-shot figures of a run's student and teacher, printed and written to ``evaluate.json``.

    ``exported``: a Hugging Face directory to evaluate as well, by transformers in PyTorch.
    ``json_file``: where the same figures go, too.
    """
    run = load_run(workdir)
    figures = figures_of(run, exported)
    for path in (Path(workdir) / "evaluate.json", json_file):
        if path:
            with output(path) as file:
                file.write(json.dumps(figures, indent=2) + "\n")
    print(table(figures))
    return figures


def figures_of(run: SavedRun, exported: str = "") -> dict:
    """``{"teacher": {top1, top5, n}, "student": ..., "exported": ..., "chance": ..., ...}``."""
    ev = run.config.eval
    if not ev.path:
        raise UserError("config.eval.path is empty in this run: it has nothing to evaluate on")
    source = open_source(ev.source, ev.path, ev.split)
    zeroshot = ZeroShot(source, ev.templates, ev.batch_size, reading=reading_of(run.config.data))
    figures = {"step": run.meta["step"], "chance": 1 / len(source.class_names)}
    if run.teacher and run.teacher.spec.text:
        figures["teacher"] = zeroshot(run.teacher.spec, run.teacher.params)
    if run.spec.text:  # else it has no part in a space that texts live in
        figures["student"] = zeroshot(run.spec, run.clip)
    if exported:
        figures["exported"] = _exported_accuracy(zeroshot, run, exported)
        figures["export_dir"] = str(exported)
    return figures


def _exported_accuracy(zeroshot: ZeroShot, run: SavedRun, exported: str) -> dict[str, float]:
    """The same images and prompts through transformers and PyTorch."""
    batches = list(zeroshot.batches(run.spec))
    ids_bl = zeroshot.prompt_ids(run.spec.text.context)
    image_ne, text_ne = hf_features(exported, (b["image"] for b in batches), [ids_bl])
    return zeroshot.score(text_ne, zip(np.split(image_ne, len(batches)), batches, strict=True))


def table(figures: dict) -> str:
    """The figures as lines of text."""
    lines = [f"{'zero-shot':10} {'top-1':>7} {'top-5':>7} {'images':>7}"]
    for name in ("teacher", "student", "exported"):
        if name in figures:
            f = figures[name]
            lines.append(f"{name:10} {f['top1']:7.2%} {f['top5']:7.2%} {f['n']:7d}")
    return "\n".join([*lines, f"{'chance':10} {figures['chance']:7.2%}"])
