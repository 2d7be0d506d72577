"""The pictures of a run as sections of the page."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from uta_jax import UserError
from uta_jax.checkpoint import load_run
from uta_jax.evals import FEATURES
from uta_jax.pictures import crops, judged
from uta_jax.pictures.colour import class_colour
from uta_jax.pictures.judged import Judged
from uta_jax.report import files
from uta_jax.report.markup import Markup, join, missing, picture, table, tag
from uta_jax.report.runs import Run

CROPS, SCENES, QUERIES, NEIGHBOURS, HARDEST, OTHERS = 8, 6, 6, 6, 10, 5


def gallery(run: Run) -> Markup:
    """All that the run's newest checkpoint can show; for what it cannot, one line that says why."""
    try:
        saved = load_run(run.workdir)
        step = tag("p", f"The student of step {saved.meta['step']:,}.", class_="note")
        seen = Judged(saved, run.workdir / FEATURES) if saved.config.eval.path else None
    except UserError as error:
        return missing(f"No pictures: {error}")
    parts = {"Crops and features by patch": lambda: _crops(saved, run.workdir)}
    if seen:
        parts |= {
            "Dense zero-shot": lambda: _scenes(seen),
            "Nearest neighbours": lambda: _strips(seen),
            "Hardest classes": lambda: _mistakes(seen),
        }
    shown = [tag("section", tag("h3", name), _tried(part)) for name, part in parts.items()]
    if not seen:
        shown.append(missing("config.eval.path is empty: there are no labelled images to picture."))
    return join([step, *shown])


def _tried(part: Callable[[], Markup]) -> Markup:
    try:
        return part()
    except UserError as error:
        return missing(f"Not shown: {error}")


def _crops(saved, workdir: Path) -> Markup:
    found = crops.pictured(saved, CROPS)
    files.draw_samples(found, workdir)
    rows = [
        [row.title, *(picture(p, row.title, row.is_map) for p in row.pictures)]
        for row in found.rows
    ]
    return join([_pictures(rows), tag("p", found.note, class_="note")])


def _pictures(rows: list[list]) -> Markup:
    return table([""] * len(rows[0]), rows, class_="pictures")


def _scenes(seen: Judged) -> Markup:
    found, classes = judged.scenes(seen, SCENES)
    rows = [["image", *(picture(scene.image, "image") for scene in found)]]
    for name in found[0].layers:
        cells = [
            join([picture(scene.layers[name][0], name), _classes(scene.layers[name][1], classes)])
            for scene in found
        ]
        rows.append([name, *cells])
    note = "Every pixel that is no background, by the name that its patch is nearest to."
    return join([_pictures(rows), tag("p", note, class_="note")])


def _classes(numbers: list[int], names: tuple[str, ...]) -> Markup:
    """The largest classes of an overlay with their colours."""
    chips = [
        tag("span", tag("i", style=f"background:rgb{class_colour(n)}"), names[n], class_="class")
        for n in numbers[:4]
    ]
    more = [tag("span", f"and {len(numbers) - 4} more", class_="class")] * (len(numbers) > 4)
    return tag("div", *chips, *more)


def _strips(seen: Judged) -> Markup:
    found, names = judged.strips(seen, QUERIES, NEIGHBOURS), seen.images().class_names
    rows = []
    for strip in found:
        for name, nearest in strip.nearest.items():
            first = _neighbour(strip.image, strip.label, strip.label, names, "")
            rest = [
                _neighbour(pixels, label, strip.label, names, f"{cosine:.2f}")
                for pixels, label, cosine in nearest
            ]
            rows.append([name, first, *rest])
    note = (
        "The image, and by cosine the nearest of "
        f"{len(seen.images()):,} tested images; a frame marks one of another class."
    )
    return join([_pictures(rows), tag("p", note, class_="note")])


def _neighbour(pixels, label: int, wanted: int, names: tuple[str, ...], cosine: str) -> Markup:
    about = names[label] if names and label >= 0 else ""
    shown = picture(pixels, about or "image", class_="" if label == wanted else "other")
    line = join([about, " ", tag("b", cosine)]) if cosine else about
    return join([shown, tag("div", tag("span", line, class_="class"))])


def _mistakes(seen: Judged) -> Markup:
    found = judged.mistakes(seen, HARDEST, OTHERS)
    total = found.counts.sum(axis=1)
    heads = ["", *found.shares, *(tag("span", name) for name in found.columns)]
    rows = []
    for number, name in enumerate(found.classes):
        shares = [f"{of[number]:.0%}" for of in found.shares.values()]
        cells = [_cell(n, total[number], column == number) for column, n in
                 enumerate(found.counts[number])]  # fmt: skip
        rows.append([name, *shares, *cells])
    note = (
        f"Shares that are named right, of {found.images:,} images; then how many images of a class "
        "(row) the student takes for which (column)."
    )
    return join([table(heads, rows, class_="confusion"), tag("p", note, class_="note")])


def _cell(count: int, total: int, right: bool) -> Markup:
    """A count, shaded by its share of the row."""
    share = float(np.clip(count / max(total, 1), 0, 1))
    kind = "right" if right else "wrong"
    return tag("span", count or "", class_=f"cell {kind}", style=f"--share:{share:.2f}")
