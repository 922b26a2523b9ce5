"""Curves over training steps, averaged over the seeds of an arm, from the runs' `metrics.jsonl` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from roundoff.report.arms import Arm
from roundoff.runs.metrics import METRICS

DRAWN = (
    "ratio_std",
    "ratio_ess",
    "mismatch_k3_kl",
    "mismatch_ess_seq",
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
CORRECTIONS = {n: metric.label for n, metric in METRICS.items() if n.startswith(("rollout_is_", "rollout_rs_"))}
"""The same of what corrections report, in charts of their own; only arms with a correction have such curves."""
MOST_POINTS = 120
"""Maximum number of points of a curve; more steps than that are averaged in bins of equal size."""


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps: the mean over seeds, and the range from the lowest to the highest seed."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int
    """Number of seeds behind the mean."""


def seed_curve(arm: Arm, key: str) -> Curve | None:
    """The quantity `key` over the steps at which every seed has a number; None if there are none.

    The seeds are those of the final runs, or of all runs if no run is final.
    """
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
    """Sigma of the first run over the steps, as a staircase; None if it is zero throughout."""
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
    """At most `MOST_POINTS` means of consecutive values, each over the same number of values."""
    size = -(-len(values) // MOST_POINTS)
    stretches = [values[i : i + size] for i in range(0, len(values), size)]
    return tuple(sum(stretch) / len(stretch) for stretch in stretches)
