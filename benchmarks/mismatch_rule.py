"""Looks for a rule of thumb in the mismatch study: the KL at which training without a correction loses one point.

For each seed, `loss = a * KL**b` is fitted through the arithmetics of rollouts, by least squares. The KL at a loss of
one point is given with Student's 95 % interval over the seeds' fits, in the logarithm. A rule of thumb needs more than
a narrow interval: arithmetics of different kinds must agree on it, and each must be predicted by the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t

from roundoff.report.arms import Arm
from roundoff.report.compare import paired_scores
from roundoff.runs.record import Run

POINT = 1.0
"""The loss in question (points)."""
FEWEST = 3
"""Fewest arithmetics through which a line of two parameters is laid, and fewest seeds of an interval."""


@dataclass(frozen=True)
class Dose:
    """One arithmetic of rollouts, by seed."""

    kl: tuple[float, ...]
    loss: tuple[float, ...]
    """Score that training with plain rollouts reached, less the score reached with these (points)."""


@dataclass(frozen=True)
class Rule:
    """KL at which a point is lost, over a group of arithmetics."""

    kl: float
    low: float
    high: float
    exponent: float
    """Mean exponent over the seeds."""
    error: float
    """Largest difference between the mean loss of an arithmetic and what the others predict for it (points)."""

    def __str__(self) -> str:
        return f"{self.kl:.2g} [{self.low:.2g}, {self.high:.2g}]"


def over_steps_of(run: Run, key: str) -> float:
    """Median over the steps of a run that trained."""
    return median(step[key] for step in run.metrics if step.get("trained") and key in step)


def dose(arm: Arm, plain: Arm, score: str) -> Dose:
    """What one arithmetic did in each seed."""
    new, old = paired_scores(arm, plain)
    losses = 100 * (getattr(old, score) - getattr(new, score)).mean(axis=1)
    kl = {run.seed: over_steps_of(run, "mismatch_k3_kl") for run in arm.final}
    return Dose(tuple(kl[seed] for seed in new.seeds), tuple(losses.tolist()))


def fitted(kl: Sequence[float], loss: Sequence[float]) -> tuple[float, float]:
    """Factor `a` (points) and exponent `b` of `loss = a * KL**b`."""
    x, y = np.log(np.asarray(kl)), np.asarray(loss)
    found = least_squares(
        lambda p: np.exp(p[0] + p[1] * x) - y, (math.log(10.0), 0.7), bounds=((-10.0, 0.2), (10.0, 3.0))
    )
    return float(np.exp(found.x[0])), float(found.x[1])


def rule(doses: Mapping[str, Dose]) -> Rule | None:
    """The rule of a group of arithmetics; None with fewer than three of them or three seeds."""
    seeds = min((len(one.kl) for one in doses.values()), default=0)
    if len(doses) < FEWEST or seeds < FEWEST:
        return None
    fits = [fitted([d.kl[s] for d in doses.values()], [d.loss[s] for d in doses.values()]) for s in range(seeds)]
    logs = [(math.log(POINT) - math.log(a)) / b for a, b in fits]
    half = float(t.ppf(0.975, seeds - 1)) * stdev(logs) / math.sqrt(seeds)
    middle = fmean(logs)
    bounds = (math.exp(value) for value in (middle, middle - half, middle + half))
    return Rule(*bounds, fmean(b for _, b in fits), max(_left_out(doses)))


def _left_out(doses: Mapping[str, Dose]) -> Iterator[float]:
    """For each arithmetic, how far its mean loss lies from what the others predict (points)."""
    for name, one in doses.items():
        others = [d for other, d in doses.items() if other != name]
        a, b = fitted([fmean(d.kl) for d in others], [fmean(d.loss) for d in others])
        yield abs(fmean(one.loss) - a * fmean(one.kl) ** b)
