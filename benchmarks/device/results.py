"""The rows of the table, and the time that a part has left.

A row is written as soon as it is measured, so that a part that dies or runs out of time leaves what it had found.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.device.machine import Device

EQUAL, REACHED, SHOWN, NOT_JUDGED = "equal", "reached", "", "not judged"
UNEQUAL, MISSED, FAILED, LEFT_OUT = "DIFFERS", "MISSED", "FAILED", "left out"


class DeviceLostError(Exception):
    """The device does not compute any more: nothing else can be measured in this process."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    measured: str
    goal: str
    verdict: str
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the row; they go into the JSON file only."""

    def to_json(self) -> str:
        """The row in one line."""
        return json.dumps(asdict(self))

    def line(self) -> str:
        """The row of a Markdown table."""
        cells = (self.part, self.what, self.measured, self.goal, self.verdict)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PREFIX = "ROW "
"""What a line of standard output begins with if the rest is a row."""


def write_row(row: Row) -> None:
    """Write a row to standard output, in one piece, since several processes may write there."""
    sys.stdout.write(f"\n{PREFIX}{row.to_json()}\n")
    sys.stdout.flush()


class Results:
    """Writes the rows of one part.

    Args:
        part: the letter of the part.
        seconds: how long the part may take.
        is_judged: whether speeds are held against their goals; equality and stated bounds always are.
        write: takes each row at once.
    """

    def __init__(self, part: str, seconds: float, *, is_judged: bool, write: Callable[[Row], None]) -> None:
        self.part, self.is_judged, self._write = part, is_judged, write
        self._until = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """Seconds until the part should end; negative after that."""
        return self._until - time.monotonic()

    def row(self, what: str, measured: str, goal: str, verdict: str, **details: Any) -> None:
        """Write one row."""
        self._write(Row(self.part, what, measured, goal, verdict, details))

    def shown(self, what: str, measured: str, **details: Any) -> None:
        """Write a figure that has no goal."""
        self.row(what, measured, "", SHOWN, **details)

    def left_out(self, what: str, why: str) -> None:
        """Write that something was not measured, and why."""
        self.row(what, why, "", LEFT_OUT)

    def equal(self, what: str, of: str, unequal: int, first: str) -> None:
        """Write how many of some elements differ, and the first that does."""
        measured = f"{of}: {unequal:,} unequal" + (f"; first: {first}" if unequal else "")
        self.row(what, measured, "0 unequal", UNEQUAL if unequal else EQUAL, unequal=unequal)

    def at_least(self, what: str, value: float, goal: float, shown: str, **details: Any) -> None:
        """Write a speed that should be at least `goal`."""
        verdict = REACHED if value >= goal else f"{MISSED} by {100 * (1 - value / goal):.0f} %"
        self._speed(what, value, f">= {goal:g}", shown, verdict, details)

    def at_most(self, what: str, value: float, goal: float, shown: str, **details: Any) -> None:
        """Write a ratio or a count that should be at most `goal`."""
        by = f" by {100 * (value / goal - 1):.0f} %" if goal else ""
        self._speed(what, value, f"<= {goal:g}", shown, REACHED if value <= goal else MISSED + by, details)

    def _speed(self, what: str, value: float, goal: str, shown: str, verdict: str, details: dict[str, Any]) -> None:
        self.row(what, shown, goal, verdict if self.is_judged else NOT_JUDGED, value=value, **details)

    @contextmanager
    def attempt(self, what: str, device: Device) -> Iterator[None]:
        """Turn an error inside the block into a row, so that the next measurement follows.

        Raises:
            DeviceLostError: if the device does not compute any more.
        """
        try:
            yield
        except DeviceLostError:
            raise
        except Exception as error:  # whatever a kernel, a compiler or a model may raise is a result
            traceback.print_exc()
            self.row(what, one_line(error), "", FAILED)
            if not device.is_alive():
                raise DeviceLostError(f"after {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
