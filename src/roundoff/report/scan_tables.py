"""Terminal tables of a scan, its frontier and its fault report. Plain data in; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def scan_table(scan: Mapping[str, Any], title: str) -> Table:
    """A row a decoder layer, a column a metric; the ranking one is starred, classic ones say so."""
    metrics: Mapping[str, Mapping[str, Any]] = scan["metrics"]
    table = Table(
        title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )  # no lines: ten columns have to fit a terminal
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    for name, metric in metrics.items():
        star = " *" if name == scan["rank_by"] else ""
        table.add_column(f"{metric['title']}{star}\n{metric['unit']}", justify="right", overflow="fold")
    rank = {layer: place for place, layer in enumerate(scan["ranking"], 1)}
    for row in scan["layers"]:
        cells = [_number(row[name]) for name in metrics]
        if "exact" in metrics and row["exact_se"] is not None:
            at = list(metrics).index("exact")
            cells[at] += f" ±{_number(row['exact_se'])}"
        table.add_row(str(row["layer"]), str(rank[row["layer"]]), *cells)
    agreements = ["-" if scan["agreement"][name] is None else f"{scan['agreement'][name]:.2f}" for name in metrics]
    table.add_section()
    table.add_row("halves", "", *agreements)
    return table


def linear_table(scan: Mapping[str, Any], count: int) -> Table | None:
    """The Linears with the largest error of input or weight; None on hardware that touches neither."""
    titles = {"energy_error": "energy error", "deadzone_ratio": "deadzone"}
    titles |= {"saturation_ratio": "saturation", "weight_error": "weight error"}
    names = [name for name in titles if any(row[name] is not None for row in scan["linears"])]
    if not names:
        return None
    rows = sorted(scan["linears"], key=lambda row: -(row["energy_error"] or row["weight_error"] or 0.0))
    table = Table(title=f"Linears with the largest error (of {len(rows)})", title_justify="left", header_style="bold")
    table.add_column("Linear")
    for name in names:
        table.add_column(titles[name], justify="right")
    for row in rows[:count]:
        table.add_row(row["name"], *(_number(row[name]) for name in names))
    return table


def frontier_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """KL of the whole model against the number of layers kept in high precision."""
    table = Table(title="KL to the clean model, k layers kept in high precision", title_justify="left")
    for heading in ("k", "KL (nats/token)", "standard error"):
        table.add_column(heading, justify="right")
    table.add_column("kept layers")
    for point in points:
        kept = ", ".join(map(str, point["kept"])) or "none"
        table.add_row(str(point["k"]), _number(point["kl"]), _number(point["se"]), kept)
    return table


def fault_lines(report: Mapping[str, Any]) -> list[str]:
    """What a fault scan found, the suspect first."""
    alarms: Sequence[Mapping[str, Any]] = report["alarms"]
    calls = report["calls"]
    odds = ", ".join(f"{share:.1%} of calls: {1 - (1 - share) ** calls:.0%}" for share in (0.1, 0.01, 0.001))
    lines = [
        f"{len(report['checked'])} sites checked (every Linear and every decoder layer), {len(alarms)} alarms",
        f"each product was computed {calls} times; odds of having met an error in {odds}",
    ]
    if alarms:
        lines.append(f"suspect: {report['suspect']} (the first in forward order)")
        lines += [f"  {alarm['check']:9} {alarm['site']}: {alarm['detail']}" for alarm in alarms]
    lines += [f"not checked: {line}" for line in report["unchecked"]]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
