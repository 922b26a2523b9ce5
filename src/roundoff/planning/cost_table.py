"""Prints what runs would take, as a table for a terminal, from the figures of the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roundoff.report import words


@dataclass(frozen=True)
class CostRow:
    """What one run of an experiment would take."""

    id: str
    steps: int
    sampling: float
    """Seconds of sampling per step."""
    updating: float
    """Seconds per step of every pass over the rollouts and of the optimizer."""
    evaluation: float
    """Seconds of one evaluation."""
    seconds: float
    """Seconds of a whole run."""
    memory: float
    """Bytes on one device at the worst moment."""
    parts: Mapping[str, float]
    """Bytes on one device, by what holds them."""


def cost_table(
    title: str, rows: Sequence[CostRow], *, seeds: int, devices: int, ranks: int, limit: float, assumed: Sequence[str]
) -> RenderableType:
    """A table with the cost of each experiment, the cost of all runs together, and what the figures rest on.

    Args:
        title: says what is planned and on which machine.
        rows: one row per experiment.
        seeds: number of runs of each experiment.
        devices: total number of devices.
        ranks: number of devices that share one run.
        limit: memory of one device (bytes); 0 if it is not known.
        assumed: the assumptions, one line each.
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
    total_seconds = seeds * sum(row.seconds for row in rows)
    at_once = max(1, devices // ranks)
    longest = max(row.seconds for row in rows)
    wall = max(total_seconds / at_once, longest)
    count = seeds * len(rows)
    each = f"{ranks} devices each" if ranks > 1 else "a device each"
    of = f"{words.number(len(rows), 'experiment')}, {words.number(seeds, 'seed')}"
    total = (
        f"{words.number(count, 'run')} ({of}), {each}: "
        f"{words.duration(total_seconds * ranks)} of one device in all; {words.duration(wall)} with {at_once} at a time"
    )
    largest = max(rows, key=lambda row: row.memory)
    held = ", ".join(f"{name} {_gigabytes(size)}" for name, size in largest.parts.items() if size > 0.05e9)
    notes = [f"Memory of {largest.id}: {held} (sampling and training take turns)." if held else ""]
    notes += ["", "What this rests on:", *(f"- {line}" for line in assumed)]
    return Group(
        Text(title, style="bold"), Text(""), table, Text(""), Text(total + "."), Text("\n".join(notes), style="dim")
    )


def _grouped(rows: Sequence[CostRow]) -> list[tuple[str, CostRow]]:
    """The experiments grouped by equal cost: the names of each group, and one row that stands for all of it."""
    groups: dict[tuple[str, ...], list[CostRow]] = {}
    for row in rows:
        costs = (row.steps, row.sampling, row.updating, row.evaluation, row.memory)
        groups.setdefault(tuple(f"{cost:.3g}" for cost in costs), []).append(row)
    return [(", ".join(row.id for row in group), group[0]) for group in groups.values()]


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else words.duration(value)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
