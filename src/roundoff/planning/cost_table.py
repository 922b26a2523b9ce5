"""What runs would take, as a table for a terminal: plain data in, from the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roundoff.report import words


@dataclass(frozen=True)
class CostRow:
    """What one experiment would take."""

    id: str
    steps: int
    sampling: float
    """Seconds a step."""
    updating: float
    """Seconds a step: every pass over the rollouts, and the optimizer."""
    evaluation: float
    """Seconds an evaluation."""
    seconds: float
    """Of a run."""
    memory: float
    """Bytes on one device at the worst moment."""
    parts: Mapping[str, float]
    """Bytes by what holds them."""


def cost_table(
    title: str, rows: Sequence[CostRow], *, seeds: int, devices: int, ranks: int, limit: float, assumed: Sequence[str]
) -> RenderableType:
    """A row an experiment, the cost of the whole, and what it rests on.

    Args:
        title: what is planned, on what.
        rows: one an experiment.
        seeds: runs of each.
        devices: devices in all.
        ranks: devices of a run.
        limit: memory of a device (bytes); 0 where it is not known.
        assumed: lines that say what was assumed.
    """
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("Experiments of equal cost")
    for name in ("Steps", "Sampling\na step", "Updates\na step", "One\nevaluation", "Run", "Memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for names, row in _grouped(rows):
        over = bool(limit) and row.memory > limit
        table.add_row(
            Text(names),
            str(row.steps),
            _seconds(row.sampling),
            _seconds(row.updating),
            _seconds(row.evaluation),
            words.duration(row.seconds),
            Text(_gigabytes(row.memory) + ("\ntoo much" if over else ""), style="red" if over else ""),
        )
    whole = seeds * sum(row.seconds for row in rows)
    at_once = max(1, devices // ranks)
    longest = max(row.seconds for row in rows)
    wall = max(whole / at_once, longest)
    count = seeds * len(rows)
    each = f"{ranks} devices each" if ranks > 1 else "a device each"
    of = f"{words.number(len(rows), 'experiment')}, {words.number(seeds, 'seed')}"
    total = (
        f"{words.number(count, 'run')} ({of}), {each}: "
        f"{words.duration(whole * ranks)} of one device in all; {words.duration(wall)} with {at_once} at a time"
    )
    largest = max(rows, key=lambda row: row.memory)
    held = ", ".join(f"{name} {_gigabytes(size)}" for name, size in largest.parts.items() if size > 0.05e9)
    notes = [f"Memory of {largest.id}: {held} (sampling and training take turns)." if held else ""]
    notes += ["", "What this rests on:", *(f"- {line}" for line in assumed)]
    return Group(
        Text(title, style="bold"), Text(""), table, Text(""), Text(total + "."), Text("\n".join(notes), style="dim")
    )


def _grouped(rows: Sequence[CostRow]) -> list[tuple[str, CostRow]]:
    """One row of each cost, with the names of all that share it."""
    found: dict[tuple[str, ...], list[CostRow]] = {}
    for row in rows:
        costs = (row.steps, row.sampling, row.updating, row.evaluation, row.memory)
        found.setdefault(tuple(f"{cost:.3g}" for cost in costs), []).append(row)
    return [(", ".join(row.id for row in group), group[0]) for group in found.values()]


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else words.duration(value)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
