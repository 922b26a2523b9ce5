"""Computes the geometry of every plot: positions in percent of the drawing area, ticks, colours and hover texts.

The templates draw the plots as inline SVG. Horizontal positions are percentages, so that a plot fits any screen without
shrinking its text; lines are paths in a box of `BOX` units, which the template stretches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from roundoff.report import words
from roundoff.report.contents import Row
from roundoff.report.curves import CORRECTIONS, DIAGNOSTICS, Curve

BOX = 1000
"""Width and height of the box in which the paths of a line chart are given."""
COLOURS = 6
"""Maximum number of lines of different colours in one chart; with more arms, each gets a small chart of its own."""
GREY = -1
"""Colour of a baseline in the background."""
PEAK = 8.0
"""A diagnostic is cut off at this multiple of its median, if its highest value is more than twice as far above."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    """Position in percent of the axis' length."""
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear axis with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        """Position of a value in percent of the axis' length."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class Mark:
    """An estimate with its interval on a forest plot (positions in percent)."""

    style: str
    """Class in the style sheet: `start`, `deployed`, `clean`, `up`, `down` or `open`."""
    tip: str
    """Hover text."""
    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Forest:
    """Estimates with their intervals, one line per row, on a shared axis."""

    axis: Axis
    marks: dict[str, tuple[Mark, ...]]
    """Marks of each row, by its key."""
    reference: float | None
    """Position of the zero line (percent), if there is one."""


@dataclass(frozen=True)
class Named:
    """A curve with its name and its colour, which are the same in every chart of a family."""

    label: str
    curve: Curve
    colour: int


@dataclass(frozen=True)
class Line:
    """One line of a chart: path, band and points."""

    label: str
    colour: int
    """Index in the palette, or `GREY`."""
    path: str
    """SVG path of the mean."""
    band: str
    """SVG path around the range of the seeds; empty for a single seed."""
    points: tuple[tuple[float, float, str], ...]
    """Position from the left and from the top (percent), and hover text, of each point."""


@dataclass(frozen=True)
class Chart:
    """A line chart."""

    title: str
    x_label: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


def axis(low: float, high: float, *, scale: float = 1.0, signed: bool = False, wanted: int = 5) -> Axis:
    """An axis with about `wanted` ticks at round numbers that covers [low, high].

    Labels show `value * scale`; a scale of 100 shows fractions in percent. `signed` gives positive numbers a plus sign.
    """
    if not high > low:
        low, high = low - 0.5 / scale, high + 0.5 / scale
    raw = (high - low) * scale / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low * scale / step + 1e-9), math.ceil(high * scale / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if round(step / power, 1) == 2.5 and power <= 1 else 0)
    values = [i * step for i in range(first, last + 1)]
    span = values[-1] - values[0]
    labels = [f"{value:+.{digits}f}" if signed and value else f"{value:.{digits}f}" for value in values]
    ticks = (
        Tick(round(100 * (v - values[0]) / span, 2), label.replace("-", words.MINUS))
        for v, label in zip(values, labels, strict=True)
    )
    return Axis(values[0] / scale, values[-1] / scale, tuple(ticks))


def score_forest(rows: Sequence[Row]) -> Forest | None:
    """Deployed and clean scores with their intervals, and the score before training as a tick; None without any."""
    scored = [row for row in rows if row.deployed and row.clean]
    ends = [v for row in scored for i in (row.deployed, row.clean) if i for v in (i.low, i.high)]
    ends += [row.start for row in scored if row.start is not None]
    if not ends:
        return None
    scale = axis(max(0.0, min(ends)), min(1.0, max(ends)), scale=100)
    marks = {}
    for row in scored:
        own = [
            Mark(style, f"{style} {words.score_text(i)}", *(scale.at(v) for v in (i.low, i.estimate, i.high)))
            for style, i in (("clean", row.clean), ("deployed", row.deployed))
            if i
        ]
        if row.start is not None:
            own.insert(0, Mark("start", f"start {words.percent(row.start)}", *[scale.at(row.start)] * 3))
        marks[row.key] = tuple(own)
    return Forest(scale, marks, None)


def effect_forest(rows: Sequence[Row]) -> Forest | None:
    """Differences to the declared baselines with their intervals, around the zero line; None without any."""
    compared = [(row.key, row.comparison) for row in rows if row.comparison]
    if not compared:
        return None
    ends = [v for _, c in compared for v in (c.deployed.low, c.deployed.high)]
    scale = axis(min(0.0, *ends), max(0.0, *ends), scale=100, signed=True)
    marks: dict[str, tuple[Mark, ...]] = {}
    for key, c in compared:
        style = "open" if not c.is_shown else "up" if c.deployed.estimate > 0 else "down"
        places = (scale.at(v) for v in (c.deployed.low, c.deployed.estimate, c.deployed.high))
        marks[key] = (Mark(style, f"{words.effect_text(c.deployed)} points: {c.verdict}", *places),)
    return Forest(scale, marks, scale.at(0.0))


def learning_charts(rows: Sequence[Row]) -> list[Chart]:
    """Deployed scores over steps in one chart; of many arms, each in a chart of its own with its baseline in grey."""
    drawn = [(row, row.learning) for row in rows if row.learning and len(row.learning.steps) > 1]
    return _charts(drawn, rows, "Deployed score (%)", scale=100)


def sigma_chart(rows: Sequence[Row]) -> Chart | None:
    """Sigma of AQN over steps, with arms of the same curve joined; None without AQN."""
    curves: dict[Curve, list[int]] = {}
    for i, row in enumerate(rows):
        if row.sigma:
            curves.setdefault(row.sigma, []).append(i)
    if not curves:
        return None
    named: list[Named] = []
    for curve, places in list(curves.items())[:COLOURS]:
        others = f" and {words.number(len(places) - 1, 'other')}" if len(places) > 1 else ""
        colour = places[0] if len(rows) <= COLOURS else len(named)
        named.append(Named(rows[places[0]].name + others, curve, colour))
    return _chart("AQN sigma (standard deviation)", named, scale=1, from_zero=True, pointed=False)


def diagnostic_charts(rows: Sequence[Row]) -> list[Chart]:
    """A chart over steps for each quantity of `DIAGNOSTICS` that varies; of many arms, only the first are drawn."""
    return _small_charts(DIAGNOSTICS, list(enumerate(rows[:COLOURS])))


def correction_charts(rows: Sequence[Row]) -> list[Chart]:
    """The same of `CORRECTIONS`; of many arms, only the first that have a correction are drawn."""
    corrected = [(i, row) for i, row in enumerate(rows) if row.diagnostics.keys() & CORRECTIONS.keys()]
    if len(rows) > COLOURS:
        corrected = [(i, row) for i, (_, row) in enumerate(corrected[:COLOURS])]
    return _small_charts(CORRECTIONS, corrected)


def legend(charts: Sequence[Chart]) -> list[Line]:
    """One line of each arm that any of the charts has, in the order of their colours."""
    found = {line.colour: line for chart in charts for line in chart.lines}
    return [found[colour] for colour in sorted(found)]


def _small_charts(titles: Mapping[str, str], rows: Sequence[tuple[int, Row]]) -> list[Chart]:
    """A chart for each quantity that varies in any of the rows, which come with their colours."""
    charts = []
    for key, title in titles.items():
        curves = [Named(row.name, row.diagnostics[key], colour) for colour, row in rows if key in row.diagnostics]
        if any(value != item.curve.mean[0] for item in curves for value in item.curve.mean):
            charts.append(_chart(*without_peaks(title, curves), scale=1, pointed=False))
    return charts


def without_peaks(title: str, curves: Sequence[Named]) -> tuple[str, list[Named]]:
    """The curves, cut off at `PEAK` times their median if they rise far above it, and a title that then says so."""
    values = [value for item in curves for value in item.curve.high]
    median, highest = statistics.median(values), max(values)
    limit = PEAK * median
    if median <= 0 or highest <= 2 * limit:
        return title, list(curves)

    def cut(part: Sequence[float]) -> tuple[float, ...]:
        return tuple(min(value, limit) for value in part)

    cutting = [
        replace(
            item,
            curve=replace(item.curve, mean=cut(item.curve.mean), low=cut(item.curve.low), high=cut(item.curve.high)),
        )
        for item in curves
    ]
    return f"{title} (cut off: peaks to {highest:.2g})", cutting


def _charts(drawn: Sequence[tuple[Row, Curve]], rows: Sequence[Row], title: str, *, scale: float) -> list[Chart]:
    """The curves in one chart, or in one per arm with its baseline in grey if there are many rows."""
    if not drawn:
        return []
    if len(rows) <= COLOURS:
        places = {row.key: i for i, row in enumerate(rows)}
        return [_chart(title, [Named(row.name, curve, places[row.key]) for row, curve in drawn], scale=scale)]
    curves = {(row.label, row.settings.profile): curve for row, curve in drawn}
    ends = [v for _, curve in drawn for v in (*curve.low, *curve.high)]
    charts = []
    for row, curve in drawn:
        baseline = curves.get((row.against, row.settings.profile))
        named = [Named(row.against, baseline, GREY)] if baseline else []
        named.append(Named(row.name, curve, 0))
        charts.append(_chart(f"{row.name}: deployed score (%)", named, scale=scale, limits=(min(ends), max(ends))))
    return charts


def _chart(
    title: str,
    named: Sequence[Named],
    *,
    scale: float,
    limits: tuple[float, float] | None = None,
    from_zero: bool = False,
    pointed: bool = True,
) -> Chart:
    """A chart of the curves.

    Args:
        title: its title.
        named: the curves.
        scale: factor on values in labels and hover texts.
        limits: lowest and highest value to show; None fits them to the curves.
        from_zero: whether the vertical axis begins at zero.
        pointed: whether points are drawn.
    """
    every = [item.curve for item in named]
    low = min(min(curve.low) for curve in every) if limits is None else limits[0]
    high = max(max(curve.high) for curve in every) if limits is None else limits[1]
    y = axis(0.0 if from_zero else low, high, scale=scale, wanted=4)
    last = max(curve.steps[-1] for curve in every)
    x = axis(min(curve.steps[0] for curve in every) if last > 1 else 0.0, last, wanted=4)
    x = Axis(x.low, last, tuple(Tick(x_at, t.label) for t in x.ticks if (x_at := _rescaled(t, x, last)) <= 100.01))
    lines = [_line(item, x, y, scale, pointed) for item in named]
    return Chart(title, "training step", x, y, tuple(lines))


def _rescaled(tick: Tick, old: Axis, high: float) -> float:
    """Position of a tick (percent) on an axis that ends at `high` instead."""
    value = old.low + tick.at / 100 * (old.high - old.low)
    return round(100 * (value - old.low) / (high - old.low), 2)


def _line(item: Named, x: Axis, y: Axis, scale: float, pointed: bool) -> Line:
    """The line of a curve on these axes."""
    label, curve = item.label, item.curve

    def place(step: float, value: float) -> tuple[float, float]:
        return x.at(step), round(100 - y.at(value), 2)

    def path(values: Sequence[float], steps: Sequence[float]) -> str:
        inside = (place(s, v) for s, v in zip(steps, values, strict=True))
        return " ".join(f"{a * BOX / 100:.0f},{b * BOX / 100:.0f}" for a, b in inside)

    band = ""
    if curve.seeds > 1:
        band = f"M{path(curve.low, curve.steps)} L{path(curve.high[::-1], curve.steps[::-1])}Z"
    points = []
    for step, mean, low, high in zip(curve.steps, curve.mean, curve.low, curve.high, strict=True):
        text = f"{label}, step {step:g}: {mean * scale:.4g}"
        tip = text + (f" (seeds {low * scale:.4g} to {high * scale:.4g})" if curve.seeds > 1 else "")
        points.append((*place(step, mean), tip))
    return Line(label, item.colour, f"M{path(curve.mean, curve.steps)}", band, tuple(points) if pointed else ())
