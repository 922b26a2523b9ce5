"""What evidence costs: variance components of a difference, power, and the number of seeds that an effect needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from roundoff.stats.intervals import MIN_SEEDS, SMALL, WIDENING_AT_THREE, combined, mean_squares, paired_differences

QUANTILES = 300
"""Number of quantiles of the mean square of seeds over which power is averaged; its degrees of freedom are few."""
FEW = distributions.norm.cdf(np.sqrt(3) * np.array([-1.0, 0.0, 1.0]))
"""Quantiles of the other two mean squares, whose degrees of freedom are many: the three Gauss-Hermite nodes."""
FEW_WEIGHTS = np.array([1.0, 4.0, 1.0]) / 6
"""Weights of those nodes."""


@dataclass(frozen=True, slots=True)
class Variance:
    """Variance components of one outcome or of one difference (squared fractions)."""

    seed: float
    problem: float
    residual: float

    def of_mean(self, seeds: int, problems: int) -> float:
        """Variance of the mean over `seeds` and `problems`."""
        return self.seed / seeds + self.problem / problems + self.residual / (seeds * problems)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one size of the test set needs."""

    problems: int
    seeds: int | None
    """Smallest number of seeds per arm that reaches the power; None if `most_seeds` do not."""
    power: float
    """Power with that many seeds, or with `most_seeds` if even those do not suffice."""
    runs: int | None
    """Number of runs of both arms together."""
    seconds: float | None
    """Time of those runs one after another (s); None if the time of a run is not known."""


def difference_variance(treatment: ArrayLike, baseline: ArrayLike) -> Variance:
    """Variance components of the paired differences of two measured arms, as `plan` needs them.

    A component whose estimate is negative is 0; on few seeds that is common, and does not show that there is none.

    Args:
        treatment: outcomes `[seeds, problems]` in [0, 1].
        baseline: outcomes of the same seeds and problems in the same order.

    Raises:
        ValueError: if the shapes differ, or there are fewer than two seeds or two problems.
    """
    difference = paired_differences(treatment, baseline)
    seeds, problems = difference.shape
    if seeds < 2 or problems < 2:
        raise ValueError(f"variance components need two seeds and two problems, but there are {seeds} and {problems}")
    seed, problem, residual = mean_squares(difference)
    return Variance(max(0.0, (seed - residual) / problems), max(0.0, (problem - residual) / seeds), residual)


def power(effect: float, variance: Variance, *, seeds: int, problems: int, alpha: float = 0.05) -> float:
    """Probability that `paired_benefit` shows a benefit of `effect` (fraction) at level `alpha`; 0 below 3 seeds.

    This is the power of that test itself, averaged over the variances that the test may estimate. The mean squares are
    independent multiples of chi-square; standard error, floor and Satterthwaite's degrees of freedom are computed for
    each of their values. With the degrees of freedom of the expected mean squares instead, the power at three seeds
    would come out too low (docs/statistics.md).
    """
    if seeds < MIN_SEEDS:
        return 0.0
    residual = max(variance.residual, SMALL)
    expected = (problems * variance.seed + residual, seeds * variance.problem + residual, residual)
    freedom = (seeds - 1, problems - 1, (seeds - 1) * (problems - 1))
    even = (np.arange(QUANTILES) + 0.5) / QUANTILES
    shares = (even, FEW, FEW)
    drawn = [
        mean * distributions.chi2.ppf(share, df) / df for mean, share, df in zip(expected, shares, freedom, strict=True)
    ]
    seed, problem, rest = np.meshgrid(*drawn, indexing="ij")
    total, df = combined((seed, problem, rest), seeds, problems)
    widening = WIDENING_AT_THREE if seeds == MIN_SEEDS else 1.0
    true = math.sqrt((expected[0] + expected[1] - residual) / (seeds * problems))
    bound = distributions.t.ppf(1 - alpha / 2, df) * np.sqrt(total / (seeds * problems)) * widening / true
    shift = abs(effect) / true
    probability = distributions.norm.sf(bound - shift) + distributions.norm.sf(bound + shift)
    return float(np.einsum("ijk,j,k->", probability, FEW_WEIGHTS, FEW_WEIGHTS) / QUANTILES)


def plan(
    effect: float,
    variance: Variance,
    *,
    problems: Sequence[int],
    wanted_power: float = 0.8,
    comparisons: int = 1,
    most_seeds: int = 50,
    seconds_per_run: float | None = None,
) -> list[PlanRow]:
    """The number of seeds that a benefit needs to be shown, one row per size of the test set.

    Args:
        effect: size of the benefit (fraction; 1.5 points is 0.015).
        variance: components of the variance of a difference.
        problems: sizes of the test set.
        wanted_power: probability with which the benefit shall be shown.
        comparisons: number of benefits in the table; each is tested at Holm's strictest level, `0.05 / comparisons`.
        most_seeds: largest number of seeds per arm to consider.
        seconds_per_run: time of one run (s), or None if it is not known.

    Raises:
        ValueError: if the effect or the power is not in (0, 1), or a count is too small.
    """
    if not 0 < abs(effect) < 1:
        raise ValueError(f"effect must be in (0, 1) (1.5 points is 0.015), but is {effect}")
    if not 0 < wanted_power < 1:
        raise ValueError(f"wanted_power must be in (0, 1), but is {wanted_power}")
    if comparisons < 1 or most_seeds < MIN_SEEDS or any(p < 2 for p in problems):
        raise ValueError(f"needs comparisons >= 1, most_seeds >= {MIN_SEEDS} and problems >= 2")
    rows = []
    for count in problems:
        reached, seeds = 0.0, None
        for tried in range(MIN_SEEDS, most_seeds + 1):
            reached = power(effect, variance, seeds=tried, problems=count, alpha=0.05 / comparisons)
            if reached >= wanted_power:
                seeds = tried
                break
        runs = None if seeds is None else 2 * seeds
        seconds = None if runs is None or seconds_per_run is None else runs * seconds_per_run
        rows.append(PlanRow(count, seeds, reached, runs, seconds))
    return rows
