"""Accuracy against a measured mismatch, as an SVG: needs matplotlib, which is in the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundoff.stats import Interval

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Colours that remain apart for colour-blind readers (Okabe and Ito)."""
MARKS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """One arithmetic under one correction."""

    mismatch: float
    accuracy: Interval
    """Accuracy with its interval (fraction)."""
    name: str
    is_noise: bool
    """Whether the arithmetic is noise: its points are hollow, and a dotted line of their own joins them."""


@dataclass(frozen=True)
class Line:
    """Points of one correction."""

    text: str
    points: tuple[Point, ...]


def draw(panels: Mapping[str, tuple[Sequence[Line], Interval | None]], path: Path, *, x: str) -> None:
    """Draw panels side by side and save them; a band in the background is the accuracy without any mismatch."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Texts stay texts, and equal data give an equal file.
    with plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "roundoff", "font.size": 9, "font.family": "sans-serif"}
    ):
        chart, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=True, squeeze=False)
        for place, (title, (lines, level)) in zip(axes[0], panels.items(), strict=True):
            if level is not None:
                place.axhspan(100 * level.low, 100 * level.high, color="#dddddd", zorder=0)
            for index, line in enumerate(lines):
                for noise in (False, True):
                    _join(place, index, "" if noise else line.text, [p for p in line.points if p.is_noise == noise])
            for point in lines[0].points:
                at = (point.mismatch, 100 * (point.accuracy.low if point.is_noise else point.accuracy.high))
                apart = (0, -20 if point.is_noise else 3)
                place.annotate(point.name, at, apart, textcoords="offset points", ha="center", fontsize=7)
            place.set_xscale("log")
            place.set_title(title, fontsize=10)
            place.set_xlabel(x)
            place.grid(visible=True, linewidth=0.3)
        axes[0][0].set_ylabel("% of test problems solved (95 % intervals)")
        axes[0][0].legend(frameon=False)
        chart.tight_layout()
        path.parent.mkdir(exist_ok=True)
        chart.savefig(path, metadata={"Date": None})
        plt.close(chart)


def _join(place: Any, index: int, label: str, points: Sequence[Point]) -> None:
    """Draw points with their intervals, and the line that joins them in the order of their mismatch."""
    if not points:
        return
    ordered = sorted(points, key=lambda point: point.mismatch)
    middle = [100 * point.accuracy.estimate for point in ordered]
    down = [100 * (p.accuracy.estimate - p.accuracy.low) for p in ordered]
    up = [100 * (p.accuracy.high - p.accuracy.estimate) for p in ordered]
    place.errorbar(
        [point.mismatch for point in ordered],
        middle,
        [down, up],
        label=label,
        color=COLOURS[index],
        marker=MARKS[index],
        markersize=4,
        markerfacecolor="white" if ordered[0].is_noise else COLOURS[index],
        linestyle=":" if ordered[0].is_noise else "-",
        linewidth=1,
        elinewidth=0.6,
    )
