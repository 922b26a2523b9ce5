"""Terminal tables of a scan, of its frontier and of a search for faults, from plain data and without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from roundoff.report import words

HALVES = "halves"
"""Label of the row that shows how well the rankings by two halves of the text agree."""


def scan_table(scan: Mapping[str, Any], title: str) -> ScanTable:
    """The table of a scan, from what `LayerScan.to_json` gives."""
    return ScanTable(scan, title)


@dataclass(frozen=True)
class ScanTable:
    """A row per decoder layer and a column per metric; a star marks the metric that ranks.

    If the terminal is too narrow for all metrics, those that do not fit go into further tables below, so that no word
    is broken.
    """

    scan: Mapping[str, Any]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by `rich` to print the table."""
        names = list(self.scan["metrics"])
        single = self._table(names, {})
        if Measurement.get(console, options.update(max_width=10_000), single).maximum <= options.max_width:
            yield Text(self.title, style="italic")
            yield single
            return
        widths = {name: self._width(name) for name in names}
        blocks: list[list[str]] = []
        left = 0
        for name in names:
            if not blocks or widths[name] > left:
                blocks.append([])
                left = options.max_width - sum(len(heading) + 1 for heading in (HALVES, "rank"))
            blocks[-1].append(name)
            left -= widths[name] + 1
        yield Text(self.title, style="italic")
        for number, block in enumerate(blocks):
            if number:
                yield Text("")
            yield self._table(block, widths)

    def _table(self, names: Sequence[str], widths: Mapping[str, int]) -> Table:
        """A table of these metrics, whose columns have these widths (characters) or their natural ones."""
        # It has no lines, because ten columns have to fit a terminal.
        table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("layer", justify="right", no_wrap=True)
        table.add_column("rank", justify="right", no_wrap=True)
        for name in names:
            table.add_column("\n".join(self._headings(name)), justify="right", width=widths.get(name))
        rank = {layer: place for place, layer in enumerate(self.scan["ranking"], 1)}
        for row in self.scan["layers"]:
            table.add_row(str(row["layer"]), str(rank[row["layer"]]), *(self._cell(row, name) for name in names))
        table.add_section()
        table.add_row(HALVES, "", *(self._agreement(name) for name in names))
        return table

    def _headings(self, name: str) -> tuple[str, str]:
        """Title and unit of a metric."""
        metric = self.scan["metrics"][name]
        return f"{metric['title']}{' *' if name == self.scan['rank_by'] else ''}", metric["unit"]

    def _cell(self, row: Mapping[str, Any], name: str) -> str:
        """A layer's value of a metric, with the standard error of an exact one."""
        error = row["exact_se"] if name == "exact" else None
        return _number(row[name]) + ("" if error is None else f" ±{_number(error)}")

    def _agreement(self, name: str) -> str:
        """The rank correlation of the two halves by this metric."""
        agreement = self.scan["agreement"][name]
        return "-" if agreement is None else f"{agreement:.2f}"

    def _width(self, name: str) -> int:
        """The smallest width of a metric's column in which no word and no number is broken (characters)."""
        cells = [self._cell(row, name) for row in self.scan["layers"]] + [self._agreement(name)]
        return max(map(len, [*cells, *" ".join(self._headings(name)).split()]))


def linear_table(scan: Mapping[str, Any], count: int) -> Table | None:
    """The `count` Linears with the largest error of input or weight; None on hardware that touches neither."""
    titles = {"energy_error": "energy error", "deadzone_ratio": "deadzone"}
    titles |= {"saturation_ratio": "saturation", "weight_error": "weight error"}
    names = [name for name in titles if any(row[name] is not None for row in scan["linears"])]
    if not names:
        return None
    rows = sorted(scan["linears"], key=lambda row: -(row["energy_error"] or row["weight_error"] or 0.0))
    table = Table(
        title=f"Linears with the largest error (of {len(rows)})",
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    table.add_column("Linear", no_wrap=True)
    for name in names:
        table.add_column(titles[name], justify="right")
    for row in rows[:count]:
        table.add_row(row["name"], *(_number(row[name]) for name in names))
    return table


def frontier_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """KL of the single model against the number of layers that are kept in high precision."""
    table = Table(title="KL to the clean model, k layers kept in high precision", title_justify="left")
    for heading in ("k", "KL (nats/token)", "standard error"):
        table.add_column(heading, justify="right")
    table.add_column("kept layers")
    for point in points:
        kept = ", ".join(map(str, point["kept"])) or "none"
        table.add_row(str(point["k"]), _number(point["kl"]), _number(point["se"]), kept)
    return table


def fault_lines(report: Mapping[str, Any]) -> list[str]:
    """The result of a search for faults, with the suspect first, one line each."""
    alarms: Sequence[Mapping[str, Any]] = report["alarms"]
    calls = report["calls"]
    shares = (0.1, 0.01, 0.001)
    odds = ", ".join(f"{words.percent(share)} of calls: {100 * (1 - (1 - share) ** calls):.0f} %" for share in shares)
    lines = [
        f"{len(report['checked'])} sites checked (every Linear and every decoder layer), "
        f"{words.number(len(alarms), 'alarm')}",
        f"each product was computed {calls} times; odds of having met an error in {odds}",
    ]
    if alarms:
        lines.append(f"suspect: {report['suspect']} (the first in forward order)")
        lines += [f"  {alarm['check']:9} {alarm['site']}: {alarm['detail']}" for alarm in alarms]
    lines += [f"not checked: {line}" for line in report["unchecked"]]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
