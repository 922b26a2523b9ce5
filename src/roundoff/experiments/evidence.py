"""What the studies of docs/results-mismatch.md and docs/results-remedies.md measured: one row for each remedy.

The rows are written by `python -m benchmarks.remedies_study` and `python -m benchmarks.mismatch_study` from run
directories, so that `roundoff recommend` prints what the pages print.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

FILE = Path(__file__).with_name("evidence.csv")
_SCORES = ("deployed", "clean")
_NUMBERS = ("points", "low", "high", "p")


@dataclass(frozen=True, slots=True)
class Measured:
    """A difference of scores between a remedy and its baseline, paired by seed and problem."""

    points: float
    """Mean over seeds and problems (points; positive is better)."""
    low: float
    """Lower end of the 95 % interval (points)."""
    high: float
    """Upper end (points)."""
    p: float
    """p-value, Holm-corrected over all tests of the study."""

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero and the corrected p-value is below 5 %."""
        return self.p < 0.05 and (self.low > 0 or self.high < 0)

    @property
    def is_hint(self) -> bool:
        """Whether the interval excludes zero and the corrected p-value is not below 5 %."""
        return not self.is_shown and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One arm of a study beside its baseline."""

    experiment: str
    """Id of the experiment with the remedy."""
    baseline: str
    """Id of the experiment without it."""
    profile: str
    """Scale at which both ran."""
    seeds: int
    problems: int
    """Number of test problems."""
    tests: int
    """Number of tests in the study, over which p-values are corrected."""
    deployed: Measured
    """Difference of the scores on the hardware of evaluation."""
    clean: Measured
    """Difference of the scores in plain arithmetic."""


def evidence() -> tuple[Evidence, ...]:
    """Every packaged row, in the order of the studies."""
    return parse(FILE.read_text("utf-8"))


def parse(text: str) -> tuple[Evidence, ...]:
    """The rows of a table in CSV.

    Raises:
        ValueError: if a column is missing or a number cannot be read.
    """
    rows = []
    for row in csv.DictReader(StringIO(text)):
        try:
            deployed, clean = (Measured(*(float(row[f"{score}_{number}"]) for number in _NUMBERS)) for score in _SCORES)
            seeds, problems, tests = (int(row[name]) for name in ("seeds", "problems", "tests"))
            names = (row["experiment"], row["baseline"], row["profile"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the table of evidence lacks a column: {error}") from None
        rows.append(Evidence(*names, seeds, problems, tests, deployed, clean))
    return tuple(rows)


def as_csv(rows: Iterable[Evidence]) -> str:
    """The table in CSV; numbers keep a thousandth of a point, and p-values three digits."""
    out = StringIO()
    names = ("experiment", "baseline", "profile", "seeds", "problems", "tests")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*names, *(f"{score}_{number}" for score in _SCORES for number in _NUMBERS)))
    for row in rows:
        numbers: list[str] = []
        for score in (row.deployed, row.clean):
            numbers += [f"{value:.3f}" for value in (score.points, score.low, score.high)] + [f"{score.p:.3g}"]
        writer.writerow((*(getattr(row, name) for name in names), *numbers))
    return out.getvalue()
