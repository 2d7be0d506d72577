"""The sections of the page that need no checkpoint: cards, curves, evaluations, time, keys."""

import numpy as np

from uta_jax import config as configs
from uta_jax.data.files import spread
from uta_jax.evals import EVALUATORS, as_text
from uta_jax.ledger import PHASES
from uta_jax.report.charts import Level, Line, chart, colour
from uta_jax.report.markup import Markup, escaped, join, missing, table, tag
from uta_jax.report.runs import Run

# What is drawn over the steps: title -> the figure in metrics.jsonl.
CURVES = {
    "loss": "loss",
    "learning rate": "lr",
    "gradient norm": "grad_norm",
    "images per second": "images_per_s",
    "cosine with the teacher, CLS": "cos_cls",
    "cosine with the teacher, patches": "cos_patch",
    "wait for data, ms a step": "data_wait_ms",
}
WHOSE = ("teacher", "student", "exported", "chance")  # figures of an evaluator, in this order
_ROWS = 12  # of evaluations over time, of all runs together


def chip(run: Run) -> Markup:
    """The name of a run with its colour."""
    return tag("span", tag("i", class_=f"chip {colour(run.number)}"), run.name)


def summary(run: Run) -> dict[str, object]:
    """The figures of a run that one would quote: shares, seconds, the median rate.

    Of an evaluator its first figure, as ``student_top1`` (zero-shot), ``student_knn``, ...
    """
    rates, seconds = [rate for _, rate in run.points("images_per_s")], run.seconds
    scores = {
        _quoted(name, whose): x for name in EVALUATORS for whose, x in best(run, name).items()
    }
    return {
        **scores,
        "images_per_s": float(np.median(rates)) if rates else None,
        "train_seconds": seconds["step"] if seconds else None,
        "export_dir": run.judged.get("export_dir", ""),
        "step": run.step,
        "ended": run.ended,
        "loss": run.last("loss"),
    }


def _quoted(evaluator: str, whose: str) -> str:
    if evaluator != "zeroshot":
        return f"{whose}_{evaluator}"
    return whose if whose == "chance" else f"{whose}_top1"


def best(run: Run, name: str) -> dict[str, float]:
    """The first figure of an evaluator, of whoever it was found of; {} where it did not run."""
    figure, judged = EVALUATORS[name].headline[0], run.judged.get(name, {})
    found = {whose: judged[whose][figure] for whose in WHOSE if figure in judged.get(whose, {})}
    values = [row[key] for row in run.scores().values() if (key := f"{name}/{figure}") in row]
    student = {"student": values[-1]} if values else {}
    return {w: (found | student)[w] for w in WHOSE if w in found | student}


def cards(runs: list[Run]) -> Markup:
    """Each run in a few words and figures."""
    return tag("div", *map(_card, runs), class_="cards")


def _card(run: Run) -> Markup:
    c, found = run.config, summary(run)
    about = [c.objective, c.student.preset, _mask_in_words(run)]
    about += [f"teacher {c.teacher.path}"] if c.teacher.path else []
    facts = [("steps", join([f"{run.step:,}", tag("small", f" {run.ended}")]))]
    if found["loss"] is not None:
        facts.append(("loss", f"{found['loss']:.4f}"))
    facts += _best_known(run)
    if found["images_per_s"]:
        facts.append(("images/s", f"{found['images_per_s']:,.0f}"))
    if run.seconds:
        facts.append(("time", duration(sum(run.seconds.values()))))
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    title = tag("h3", chip(run))
    return tag(
        "div", title, tag("p", " · ".join(filter(None, about))), tag("dl", *pairs), class_="card"
    )


def _mask_in_words(run: Run) -> str:
    mask = run.config.mask
    masks = configs.OBJECTIVES[run.config.objective].masks
    return f"{mask.kind.replace('_', ' ')} mask {mask.ratio:.0%}" if masks else ""


def _best_known(run: Run) -> list[tuple[str, object]]:
    """The first figure of the first evaluator that ran, beside the teacher's."""
    for name, evaluator in EVALUATORS.items():
        figure, found = evaluator.headline[0], best(run, name)
        if "student" in found:
            teacher = found.get("teacher")
            beside = "" if teacher is None else f" teacher {as_text(figure, teacher)}"
            value = join([as_text(figure, found["student"]), tag("small", beside)])
            return [(f"{name} {figure}", value)]
    return []


def duration(seconds: float) -> str:
    """h min s, as far as it matters."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def legend(runs: list[Run]) -> Markup:
    """Which colour is which run; "" for one alone."""
    return tag("p", *map(chip, runs), class_="legend") if len(runs) > 1 else Markup("")


def curves(runs: list[Run]) -> Markup:
    """Figures of training over the steps, runs overlaid."""
    charts = [
        chart(title, [Line(run.name, run.number, run.points(figure)) for run in runs])
        for title, figure in CURVES.items()
    ]
    if not any(charts):
        return missing("metrics.jsonl holds no figures of training yet.")
    bare = [run.name for run in runs if not run.points("loss")]
    note = missing(f"No figures of training yet: {', '.join(bare)}.") if bare else ""
    return join([legend(runs), tag("div", *charts, class_="charts"), note])


def evaluations(runs: list[Run]) -> Markup:
    """Every evaluator that ran on any of the runs: over the steps, and as a table."""
    parts = [_evaluator(name, runs) for name in EVALUATORS]
    bare = [run for run in runs if not run.scores()]
    notes = [
        missing(f"{run.name} was not evaluated: uta-jax evaluate --workdir={run.workdir}")
        for run in bare
    ]
    return join([*parts, *notes])


def _evaluator(name: str, runs: list[Run]) -> Markup:
    headline = EVALUATORS[name].headline
    scores = {run.number: _of(run, name) for run in runs}
    figures = [
        f for f in headline if any(f in row for of in scores.values() for row in of.values())
    ]
    if not figures:
        return Markup("")
    rows, per_run = [], max(1, _ROWS // len(runs))
    for run in runs:
        steps = list(scores[run.number])
        for place in spread(min(per_run, len(steps)), len(steps)):
            step = steps[-1 - place]  # the newest is always there
            whose = chip(run) if len(runs) > 1 else "student"
            rows.append([whose, f"{step:,}", *_cells(scores[run.number][step], figures)])
    rows += _others(name, runs, figures)
    shown_table = table(["", "step", *figures], rows, class_="numbers")
    graph = _over_time(name, figures[0], runs, scores)
    return tag(
        "section",
        tag("h3", name),
        tag("div", graph, tag("div", shown_table, _protocol(name, runs)), class_="beside"),
    )


def _of(run: Run, name: str) -> dict[int, dict[str, float]]:
    """Step -> the figures of one evaluator, without its name."""
    found = {
        step: {
            key.removeprefix(f"{name}/"): x for key, x in row.items() if key.startswith(f"{name}/")
        }
        for step, row in run.scores().items()
    }
    return {step: row for step, row in found.items() if row}


def _cells(row: dict[str, float], figures: list[str]) -> list[str]:
    return [as_text(figure, row.get(figure)) for figure in figures]


def _others(name: str, runs: list[Run], figures: list[str]) -> list[list]:
    """Teachers, the exported model and chance, each once."""
    rows = {}
    for run in runs:
        for whose in ("teacher", "exported", "chance"):
            found = run.judged.get(name, {}).get(whose)
            if found:
                rows[whose, *_cells(found, figures)] = None
    return [[whose, "", *cells] for whose, *cells in rows]


def _over_time(name: str, figure: str, runs: list[Run], scores: dict) -> Markup:
    lines = [
        Line(run.name, run.number, [(s, row[figure]) for s, row in scores[run.number].items()])
        for run in runs
        if all(figure in row for row in scores[run.number].values())
    ]
    if not any(len(line.points) > 1 for line in lines):
        return Markup("")
    teachers = {run.of_teacher(name)[figure] for run in runs if figure in run.of_teacher(name)}
    levels = [Level("teacher", value) for value in sorted(teachers)]
    return chart(f"{name} {figure}", lines, levels, percent=as_text(figure, 1.0).endswith("%"))


def _protocol(name: str, runs: list[Run]) -> Markup:
    """How it was measured, as ``evaluate`` recorded it."""
    found = {}
    for run in runs:
        protocol = run.judged.get(name, {}).get("protocol", {})
        if protocol:
            found["; ".join(f"{key}: {value}" for key, value in protocol.items())] = None
    return join(tag("p", line, class_="note") for line in found)


def ledger(runs: list[Run]) -> Markup:
    """Where the time went: a bar a run, and the seconds."""
    timed = [run for run in runs if run.seconds]
    if not timed:
        return missing("metrics.jsonl holds no ledger of time yet.")
    longest = max(sum(run.seconds.values()) for run in timed)
    bars = [_bar(run, longest) for run in timed]
    key = tag("p", *(tag("span", tag("i", class_=f"chip {p}"), p) for p in PHASES), class_="legend")
    rows = [
        [
            chip(run),
            *(f"{run.seconds[p]:,.1f}" for p in PHASES),
            f"{sum(run.seconds.values()):,.1f}",
        ]
        for run in timed
    ]
    numbers = table(["seconds", *PHASES, "all"], rows, class_="numbers")
    return join([key, *bars, numbers])


def _bar(run: Run, longest: float) -> Markup:
    parts = [
        tag("i", class_=phase, style=f"width:{seconds / longest:.4%}", title=f"{phase} {seconds} s")
        for phase, seconds in run.seconds.items()
        if seconds
    ]
    return tag("div", *parts, class_="bar")


def keys(runs: list[Run]) -> Markup:
    """Between runs what differs; of a run alone, what differs from the defaults."""
    flat = {escaped(chip(run)): configs.leaves(run.config) for run in runs}
    if len(runs) == 1:
        flat = {"default": configs.leaves(configs.default_config())} | flat
    columns = list(flat.values())
    rows = [
        [tag("code", key), *(tag("code", _value(column[key])) for column in columns)]
        for key in columns[0]
        if any(column[key] != columns[0][key] for column in columns)
    ]
    if not rows:
        return missing("The configurations are the same.")
    return table(["key", *map(Markup, flat)], rows, class_="keys")


def _value(value: object) -> str:
    return repr(value) if value == "" else str(value)
