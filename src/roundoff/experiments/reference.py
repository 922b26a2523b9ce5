"""Scores that others published for experiments of the table, kept apart from everything that is measured here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("reference.csv")


@dataclass(frozen=True, slots=True)
class Reference:
    """The published score of one experiment: one run on GSM8K (1,319 problems), with a standard error of 1.3 points."""

    score_percent: float
    """Accuracy on the test set (percent)."""
    label: str
    """Name under which the run was published; empty if it had none."""


def reference_scores() -> dict[str, Reference]:
    """Published scores by the id of the experiment; experiments without one are absent."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {row["id"]: Reference(float(row["score_percent"]), row["label"]) for row in csv.DictReader(file)}
