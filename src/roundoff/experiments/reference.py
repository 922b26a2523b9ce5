"""Scores that others published for rows of the table: reference data, kept apart from anything measured here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("reference.csv")


@dataclass(frozen=True, slots=True)
class Reference:
    """What was published for one experiment: one run on GSM8K (1,319 problems), so a standard error of 1.3 points."""

    score_percent: float
    """Accuracy on the test set (percent)."""
    label: str
    """Name that the run was published under; empty where it had none."""


def reference_scores() -> dict[str, Reference]:
    """Published scores by experiment id; experiments without one are left out."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {row["id"]: Reference(float(row["score_percent"]), row["label"]) for row in csv.DictReader(file)}
