"""Curves over training steps, averaged over the seeds of an arm, from `metrics.jsonl` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from roundoff.report.arms import Arm
from roundoff.runs.metrics import METRICS

DRAWN = (
    "ratio_std",
    "ratio_ess",
    "clip_fraction",
    "kl",
    "entropy",
    "grad_norm",
    "reward",
    "response_tokens",
    "truncated",
)
DIAGNOSTICS = {name: METRICS[name].label for name in DRAWN}
"""Metrics that are drawn as diagnostics, with their titles and units."""
MOST_POINTS = 120
"""Points a drawn curve has at most: more steps are averaged in equal bins."""


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps: mean over seeds, and the range from the lowest to the highest seed."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int
    """Seeds averaged."""


def seed_curve(arm: Arm, key: str) -> Curve | None:
    """`key` over steps, or None where no run has it; a step counts where each seed that is scored has a number."""
    runs = arm.final or arm.runs
    series = [
        {row["step"]: float(row[key]) for row in run.metrics if row.get(key) is not None and math.isfinite(row[key])}
        for run in runs
    ]
    series = [values for values in series if values]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(values) for values in series)))
    columns = [[values[step] for values in series] for step in steps]
    if not steps:
        return None
    mean = [sum(column) / len(column) for column in columns]
    return Curve(
        steps=_bins([float(step) for step in steps]),
        mean=_bins(mean),
        low=_bins([min(column) for column in columns]),
        high=_bins([max(column) for column in columns]),
        seeds=len(series),
    )


def sigma_curve(arm: Arm) -> Curve | None:
    """Sigma at every change of it, as a staircase; None where it is zero throughout."""
    rows = [(row["step"], float(row["sigma"])) for row in arm.runs[0].metrics if row.get("sigma") is not None]
    if not any(sigma for _, sigma in rows):
        return None
    steps: list[float] = []
    values: list[float] = []
    for step, sigma in rows:
        if values and sigma == values[-1]:
            continue
        if values:
            steps.append(float(step))
            values.append(values[-1])
        steps.append(float(step))
        values.append(sigma)
    steps.append(float(rows[-1][0]))
    values.append(rows[-1][1])
    return Curve(tuple(steps), tuple(values), tuple(values), tuple(values), 1)


def _bins(values: Sequence[float]) -> tuple[float, ...]:
    """At most `MOST_POINTS` means of equal stretches of the values."""
    size = -(-len(values) // MOST_POINTS)
    stretches = [values[i : i + size] for i in range(0, len(values), size)]
    return tuple(sum(stretch) / len(stretch) for stretch in stretches)
