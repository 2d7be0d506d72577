"""``uta-jax report``: runs as one HTML page, whole in itself: no script, no network.

``runs`` reads the folders, ``figures`` and ``gallery`` make the sections, ``charts`` and ``markup``
the SVG and HTML in them; ``page.html`` beside this file is the frame and the style.
"""

import json
from pathlib import Path
from string import Template

from uta_jax.data.files import output
from uta_jax.report import figures, files
from uta_jax.report.gallery import gallery
from uta_jax.report.markup import join, tag
from uta_jax.report.runs import Run, open_runs

PAGE = "report.html"  # in the first workdir


def report(
    workdirs: list[str | Path], out: str | Path = "", json_file: str | Path = ""
) -> dict[str, dict]:
    """Write the page of one or more runs; prints and returns the summary of each by its name.

    Every workdir gets ``summary.json``, ``curves.png`` and, where its checkpoint and training data
    can be read, ``samples.png``.

    ``out``: the page, by default ``report.html`` in the first workdir; it appears whole or not at
    all. ``json_file``: where the summaries go as well.

    Raises:
      UserError: a folder that is no workdir, or is named twice; a page that cannot be written.
    """
    runs = open_runs(workdirs)
    out = Path(out or runs[0].workdir / PAGE)
    summaries = {run.name: figures.summary(run) for run in runs}
    with output(out) as file:  # first: what cannot be written is told of before the work
        file.write(page(runs))
    for run in runs:
        files.write_summary(run)
        files.draw_curves(run)
    if json_file:
        with output(json_file) as file:
            file.write(json.dumps(summaries, indent=2) + "\n")
    for name, summary in summaries.items():
        print(name)
        for key, value in summary.items():
            print(f"  {key:20} {_shown(key, value)}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return summaries


def _shown(key: str, value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.2%}" if key == "chance" or key.endswith("_top1") else f"{value:.4g}"


def page(runs: list[Run]) -> str:
    """The whole page as text."""
    title = ", ".join(run.name for run in runs)
    sections = {
        "Training": figures.curves(runs),
        "Evaluation": figures.evaluations(runs),
        "Time": figures.ledger(runs),
        "Configuration": figures.keys(runs),
    }
    for run in runs:
        sections[f"Pictures: {run.name}" if len(runs) > 1 else "Pictures"] = gallery(run)
    links = [tag("a", name, href=f"#s{n}") for n, name in enumerate(sections)]
    shown = [
        tag("section", tag("h2", name), content, id=f"s{n}")
        for n, (name, content) in enumerate(sections.items())
    ]
    frame = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    body = join([tag("h1", title), figures.cards(runs), tag("nav", *links), *shown])
    return frame.substitute(title=tag("title", f"{title}: uta-jax"), body=body)
