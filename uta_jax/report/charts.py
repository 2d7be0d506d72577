"""Lines over the steps of a run as SVG inside the page, in the page's own colours."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from uta_jax.report.markup import Markup, tag

_WIDTH, _HEIGHT = 340, 190  # units of the drawing; it is scaled to the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24  # margins
_POINTS = 300  # of a line; of more, means are drawn
_MARKED = 12  # points of a line at most, for each to be marked
_COLOURS = 8  # classes of the style sheet


class Line(NamedTuple):
    """The figures of one run. ``number`` picks the colour; steps without one are left out."""

    name: str
    number: int
    points: list[tuple[int, float]]


class Level(NamedTuple):
    """What does not change over the steps, as the teacher's score."""

    name: str
    value: float


def colour(number: int) -> str:
    """The class of the style sheet for a run."""
    return f"run{number % _COLOURS}"


def chart(
    title: str, lines: Sequence[Line], levels: Sequence[Level] = (), percent: bool = False
) -> Markup:
    """A figure with its title; "" where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    plot = _Plot(
        [step for line in lines for step, _ in line.points],
        [y for line in lines for _, y in line.points] + [level.value for level in levels],
        percent,
    )
    drawn = [plot.axes(), *map(plot.level, levels), *map(plot.line, lines)]
    svg = tag("svg", *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    last = plot.text(lines[0].points[-1][1]) if len(lines) == 1 else ""
    caption = tag("figcaption", tag("span", title), tag("b", last) if last else "")
    return tag("figure", caption, svg, class_="chart")


class _Plot:
    """Steps and figures to places in the drawing."""

    def __init__(self, steps: list[int], values: list[float], percent: bool):
        self._percent, self._first, self._last = percent, min(0, *steps), max(steps)
        self._ticks = nice_ticks(min(values), max(values))
        self._low = min(self._ticks[0], min(values))
        self._high = max(self._ticks[-1], max(values))

    def _x(self, step: float) -> float:
        share = (step - self._first) / max(self._last - self._first, 1)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def _y(self, value: float) -> float:
        share = (value - self._low) / max(self._high - self._low, 1e-12)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def text(self, value: float) -> str:
        """A figure in few letters."""
        return f"{value:.1%}" if self._percent else f"{value:.4g}"

    def axes(self) -> Markup:
        """Grid, and the numbers beside it."""
        parts = []
        for value in self._ticks:
            y, label = self._y(value), f"{value:.0%}" if self._percent else f"{value:g}"
            if self._percent and self._ticks[1] - self._ticks[0] < 0.01:
                label = f"{value:.1%}"
            parts += [_stroke(_LEFT, y, _WIDTH - _RIGHT, y, "grid")]
            parts += [tag("text", label, x=_LEFT - 6, y=y + 3.5, class_="end")]
        for step in nice_ticks(self._first, self._last):
            if self._first <= step <= self._last:
                x = self._x(step)
                label = f"{step:g}" if step < 1e4 else f"{step / 1e3:g}k"
                parts += [tag("text", label, x=x, y=_HEIGHT - 7, class_="middle")]
        return tag("g", *parts, class_="axes")

    def level(self, level: Level) -> Markup:
        """A dashed line over the whole width, with its name."""
        y, name = self._y(level.value), f"{level.name} {self.text(level.value)}"
        above = y - 4 if y > _TOP + 12 else y + 11
        label = tag("text", name, x=_WIDTH - _RIGHT - 2, y=above, class_="end")
        return tag("g", _stroke(_LEFT, y, _WIDTH - _RIGHT, y), label, class_="level")

    def line(self, line: Line) -> Markup:
        """The points joined; a few of them are marked, and tell their figures."""
        places = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in thinned(line.points))
        marks = line.points if len(line.points) <= _MARKED else line.points[-1:]
        dots = [
            tag(
                "circle",
                tag("title", f"{line.name}, step {x}: {self.text(y)}"),
                cx=self._x(x), cy=self._y(y), r=2.6,
            )
            for x, y in marks
        ]  # fmt: skip
        return tag("g", tag("polyline", points=places), *dots, class_=colour(line.number))


def _stroke(x1: float, y1: float, x2: float, y2: float, class_: str = "") -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, about as many as asked for, from below ``low`` to above ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_POINTS``: the means of neighbours; the first and the last stay as they are."""
    size = -(-len(points) // _POINTS)
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    means = [tuple(sum(axis) / len(group) for axis in zip(*group, strict=True)) for group in groups]
    return [points[0], *means, points[-1]]
