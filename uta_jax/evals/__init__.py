"""Evaluators: what a model can do, measured on data it did not train on.

An evaluator is ``run(params, frozen, cfg) -> figures``: ``params`` of the CLIP that is measured
(vision, text), ``frozen`` those of its teacher ({} without one), ``cfg`` a ``Setting``. A name with
``class/`` or ``position/`` is a detail; the others are what is logged during training.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from uta_jax import UserError, processes
from uta_jax import mesh as meshes
from uta_jax.checkpoint import SavedRun, load_run
from uta_jax.config import reading_of
from uta_jax.data.files import output
from uta_jax.evals import alignment, dense, knn, linear_probe, names, retrieval, zeroshot
from uta_jax.evals.features import Features, Pooled
from uta_jax.evals.setting import Data, Evaluator, Setting
from uta_jax.interop.export import hf_features
from uta_jax.models.presets import ClipSpec

# The one table: name -> evaluator.
EVALUATORS: dict[str, Evaluator] = {
    "zeroshot": Evaluator(
        zeroshot.run, zeroshot.protocol, ("top1", "top5", "mean_class"), joint_space=True
    ),
    "retrieval": Evaluator(
        retrieval.run, retrieval.protocol, retrieval.HEADLINE, roles=("captions",), joint_space=True
    ),
    "knn": Evaluator(knn.run, knn.protocol, knn.HEADLINE, roles=("fit", "test")),
    "linear_probe": Evaluator(
        linear_probe.run, linear_probe.protocol, linear_probe.HEADLINE, roles=("fit", "test")
    ),
    "dense": Evaluator(
        dense.run, dense.protocol, dense.HEADLINE, roles=("masks",), joint_space=True
    ),
    "alignment": Evaluator(
        alignment.run, alignment.protocol, alignment.HEADLINE, of_teacher=False, joint_space=True
    ),
}
FEATURES = "features"  # folder of a workdir


def check_names(wanted: Iterable[str], key: str = "config.eval.names") -> tuple[str, ...]:
    """``wanted`` as a tuple; UserError for a name that is not in the table."""
    wanted = tuple(wanted)
    for name in wanted:
        if name not in EVALUATORS:
            raise UserError(f"{key}={name}: must be one of {', '.join(EVALUATORS)}")
    return wanted


def fitting(wanted: Iterable[str], spec: ClipSpec) -> tuple[str, ...]:
    """Those of ``wanted`` that mean something for a model: one without texts has none of theirs."""
    return tuple(n for n in wanted if spec.text or not EVALUATORS[n].joint_space)


def open_all(data: Data, wanted: Iterable[str]) -> None:
    """Open what the evaluators will read, so that a mistake is told of before the training."""
    for name in wanted:
        for role in EVALUATORS[name].roles:
            data(role)


def measure(wanted: Iterable[str], params: dict, frozen: dict, cfg: Setting) -> dict[str, dict]:
    """Name -> the figures of each evaluator, in order.

    Raises:
      UserError: as the evaluators do, and for a figure that is not a number.
    """
    return {name: _measured(name, params, frozen, cfg) for name in wanted}


def _measured(name: str, params: dict, frozen: dict, cfg: Setting) -> dict[str, float]:
    figures = EVALUATORS[name].run(params, frozen, cfg)
    wrong = [figure for figure, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise UserError(
            f"eval {name}: {', '.join(wrong[:3])} came out as {figures[wrong[0]]}: the weights are "
            "damaged or have diverged"
        )
    return figures


def is_detail(figure: str) -> bool:
    """Whether a figure is one of very many: of a class or a position."""
    return figure.startswith(("class/", "position/"))


def is_scored(row: dict) -> bool:
    """Whether a row of ``metrics.jsonl`` holds what evaluators found."""
    return any(name.split("/", 1)[0] in EVALUATORS for name in row)


def evaluate(
    workdir: str | Path, exported: str = "", json_file: str = "", wanted: Iterable[str] = ()
) -> dict:
    """Figures of a run's student and its teacher, printed and written to ``evaluate.json``.

    That file keeps what other evaluators found at the same step. Image features are kept in the
    folder ``features`` of the run, which may be deleted at any time.

    ``exported``: a Hugging Face directory whose zero-shot accuracy is measured as well, by
    transformers in PyTorch. ``json_file``: where the same figures go, too. ``wanted``: names of
    evaluators; by default those of the run's configuration. Of several processes all must call it,
    and the first one writes and prints.
    """
    check_names(wanted, "--eval")
    workdir, run = Path(workdir), load_run(workdir)
    figures = figures_of(run, wanted, exported, workdir / FEATURES)
    if processes.is_first():
        _record(workdir, figures, json_file)
    return figures


def _record(workdir: Path, figures: dict, json_file: str) -> None:
    """Write and print what ``evaluate`` found."""
    kept = _earlier(workdir / "evaluate.json", figures["step"])
    for path, content in ((workdir / "evaluate.json", kept | figures), (json_file, figures)):
        if path:
            with output(path) as file:
                file.write(json.dumps(content, indent=2) + "\n")
    print(table(figures))


def _earlier(path: Path, step: int) -> dict:
    """What was found before at this very step; {} where there is nothing of it."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if found.get("step") == step else {}


def figures_of(
    run: SavedRun,
    wanted: Iterable[str] = (),
    exported: str = "",
    folder: Path | None = None,
    with_teacher: bool = True,
) -> dict:
    """``{"step": ..., NAME: {"protocol": {...}, "teacher": {...}, "student": {...}}, ...}``.

    ``folder``: where image features are kept. ``with_teacher``: False where its own figures are
    known already.
    """
    config, teacher = run.config, run.teacher
    if not config.eval.path:
        raise UserError("config.eval.path is empty in this run: it has nothing to evaluate on")
    asked = check_names(wanted) or check_names(config.eval.names)
    wanted = fitting(asked, run.spec)
    if not wanted:
        raise UserError(
            f"{', '.join(asked)}: nothing that a student of {config.objective!r} can do, which has "
            "no part in a space of texts; ask for --eval knn or linear_probe"
        )
    mesh, reading = meshes.make_mesh(), reading_of(config.data)
    features = Features(config.eval.batch_size, mesh, reading, folder)
    data, teacher_spec = Data(config), teacher and run.task.teacher
    of_student = Setting(config.eval, run.spec, teacher_spec, data, features)
    frozen = teacher.params if teacher else {}
    figures = {"step": run.meta["step"]}
    for name in wanted:
        found = {"protocol": EVALUATORS[name].protocol(of_student)}
        theirs = with_teacher and teacher and EVALUATORS[name].of_teacher
        if theirs and fitting((name,), teacher.spec):
            of_teacher = Setting(config.eval, teacher.spec, teacher_spec, data, features)
            found["teacher"] = _measured(name, frozen, frozen, of_teacher)
        found["student"] = _measured(name, run.clip, frozen, of_student)
        figures[name] = found
    if "zeroshot" in figures:
        classes = names.class_names(data("test"), config.eval.classnames)
        figures["zeroshot"]["chance"] = {"top1": 1 / len(classes)}
        if exported:
            figures["zeroshot"]["exported"] = _exported(of_student, classes, exported)
            figures["export_dir"] = str(exported)
    return figures


def _exported(cfg: Setting, classes: tuple[str, ...], exported: str) -> dict[str, float]:
    """The same images and prompts through transformers and PyTorch."""
    templates = zeroshot.all_templates(cfg)
    ids_bl = zeroshot.prompt_ids(classes, templates, cfg.spec.text.context)
    rows = []

    def images() -> Iterator[np.ndarray]:
        for batch in cfg.features.batches(cfg.spec, cfg.data("test")):
            batch = meshes.fetch(batch)
            rows.append((batch["index"], batch["label"], batch["valid"]))
            yield batch["image"]

    image_ne, text_me = hf_features(exported, images(), [ids_bl])
    index_n, label_n, valid_n = (np.concatenate(column) for column in zip(*rows, strict=True))
    pooled = Pooled(np.asarray(image_ne)[valid_n], index_n[valid_n], label_n[valid_n])
    return zeroshot.scores(zeroshot.class_weights(text_me, len(templates)), pooled, classes)


def table(figures: dict) -> str:
    """The figures as lines of text, the protocol of each below it."""
    lines = []
    for name in (name for name in EVALUATORS if name in figures):
        found, shown = figures[name], EVALUATORS[name].headline
        shown = [figure for figure in shown if figure in found["student"]]
        widths = [max(len(figure), 7) for figure in shown]
        heads = (f"{figure:>{width}}" for figure, width in zip(shown, widths, strict=True))
        lines.append(f"{name:12} {'  '.join(heads)}  images")
        for whose in ("teacher", "student", "exported", "chance"):
            if whose in found:
                lines.append(f"{whose:12} {_row(found[whose], shown, widths)}")
        about = "; ".join(f"{key}: {value}" for key, value in found["protocol"].items())
        lines += [f"  {about}", ""]
    return "\n".join(lines[:-1])


def _row(found: dict[str, float], shown: list[str], widths: list[int]) -> str:
    cells = [
        f"{as_text(figure, found.get(figure)):>{width}}"
        for figure, width in zip(shown, widths, strict=True)
    ]
    count = found.get("n", found.get("n_images", ""))
    return f"{'  '.join(cells)}  {count:>6}".rstrip()


def as_text(figure: str, value: float | None) -> str:
    """Shares in percent; cosines, CKA and C as they are; "" for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if figure.startswith(("cos", "cka", "C")) else f"{value:.2%}"
