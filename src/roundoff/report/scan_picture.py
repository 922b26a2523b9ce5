"""Draws a scan as SVG, with a row per decoder layer and a column per metric, from plain data and without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CELL_WIDTH, CELL_HEIGHT = 74, 16
"""Size of a cell (px)."""
LEFT, TOP, BOTTOM = 56, 92, 34
"""Margins (px)."""
FONT = 11
"""Size of the font (px)."""
LIGHT, DARK = (247, 251, 255), (8, 48, 107)
"""Colours (RGB) of the smallest and of the largest damage in a column."""


def scan_picture(scan: Mapping[str, Any], title: str, *, standalone: bool = True) -> str:
    """An SVG of a scan, in which cells are dark where the damage is large.

    Each column has its own colour scale from its smallest to its largest damage, because units differ. A small ratio in
    dB counts as large damage. The ranking is at the right.

    Args:
        scan: the result of `LayerScan.to_json`.
        title: the heading of the picture.
        standalone: whether the picture is a file of its own; inside a page it needs no namespace and shows no heading.
    """
    metrics: Mapping[str, Mapping[str, Any]] = scan["metrics"]
    rows: Sequence[Mapping[str, Any]] = scan["layers"]
    rank = {layer: place for place, layer in enumerate(scan["ranking"], 1)}
    width = LEFT + CELL_WIDTH * len(metrics) + 60
    height = TOP + CELL_HEIGHT * len(rows) + BOTTOM
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    named = f'role="img" aria-label="{escape(title)}"'
    parts = [
        f'<svg{namespace} viewBox="0 0 {width} {height}" width="{width}" height="{height}" {named} '
        f'font-family="sans-serif" font-size="{FONT}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    if standalone:
        parts.append(f'<text x="8" y="18" font-size="14" font-weight="bold">{escape(title)}</text>')
    for column, (name, metric) in enumerate(metrics.items()):
        x = LEFT + column * CELL_WIDTH
        parts.append(_heading(x, metric, chosen=name == scan["rank_by"]))
        shades = _shades([row[name] for row in rows], decibel=metric["decibel"])
        for place, (row, shade) in enumerate(zip(rows, shades, strict=True)):
            y = TOP + place * CELL_HEIGHT
            tip = f"layer {int(row['layer'])}, {metric['title']}: {row[name]:.4g} {metric['unit']}"
            ink = "white" if shade > 0.55 else "black"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 1}" fill="{_colour(shade)}">'
                f"<title>{escape(tip)}</title></rect>"
                f'<text x="{x + CELL_WIDTH / 2 - 1:g}" y="{y + 12}" text-anchor="middle" fill="{ink}">'
                f"{row[name]:.3g}</text>"
            )
    right = LEFT + CELL_WIDTH * len(metrics) + 8
    parts.append(f'<text x="{right}" y="{TOP - 8}">rank</text>')
    for place, row in enumerate(rows):
        y = TOP + place * CELL_HEIGHT + 12
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{int(row["layer"])}</text>')
        parts.append(f'<text x="{right}" y="{y}">{rank[row["layer"]]}</text>')
    parts.append(
        f'<text x="8" y="{height - 12}">rows: decoder layers; each column is shaded from its smallest to its largest '
        "damage; * ranks</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _heading(x: float, metric: Mapping[str, Any], *, chosen: bool) -> str:
    """The slanted heading of a column, with a star if its metric ranks."""
    text = escape(f"{metric['title']}{' *' if chosen else ''}")
    weight = ' font-weight="bold"' if chosen else ""
    at = f'x="{x + 6}" y="{TOP - 8}" transform="rotate(-24 {x + 6} {TOP - 8})"'
    return f"<text {at}{weight}>{text}<title>{escape(metric['meaning'])} ({escape(metric['unit'])})</title></text>"


def _shades(values: Sequence[float], *, decibel: bool) -> list[float]:
    """Shades from 0 for the smallest damage of a column to 1 for the largest, on a log scale if it spans a decade."""
    damage = [-value if decibel else value for value in values]
    finite = [value for value in damage if math.isfinite(value)]
    if not decibel and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        damage = [math.log(value) if 0 < value < math.inf else value for value in damage]
        finite = [value for value in damage if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if high == low:
        return [0.0] * len(damage)
    return [min(1.0, max(0.0, (value - low) / (high - low))) for value in damage]


def _colour(shade: float) -> str:
    """The colour of a shade in [0, 1]."""
    red, green, blue = (round(a + (b - a) * shade) for a, b in zip(LIGHT, DARK, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
