"""What evidence costs: components of variance of a difference, power, and the seeds that an effect needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from roundoff.stats.intervals import MIN_SEEDS, SMALL, WIDENING_AT_THREE, combined, mean_squares, paired_differences

QUANTILES = 300
"""Quantiles of the mean square of seeds, whose degrees of freedom are few, over which power is averaged."""
FEW = distributions.norm.cdf(np.sqrt(3) * np.array([-1.0, 0.0, 1.0]))
"""Quantiles of the two other mean squares, whose degrees of freedom are many: Gauss and Hermite's three nodes."""
FEW_WEIGHTS = np.array([1.0, 4.0, 1.0]) / 6


@dataclass(frozen=True, slots=True)
class Variance:
    """Components of variance of one outcome or one difference (squared fractions)."""

    seed: float
    problem: float
    residual: float

    def of_mean(self, seeds: int, problems: int) -> float:
        """Variance of the mean over `seeds` and `problems`."""
        return self.seed / seeds + self.problem / problems + self.residual / (seeds * problems)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one size of test set asks for."""

    problems: int
    seeds: int | None
    """Fewest seeds an arm that reach the power; None if `most_seeds` do not."""
    power: float
    """Power with that many seeds (with `most_seeds` where none suffices)."""
    runs: int | None
    """Runs of both arms together."""
    seconds: float | None
    """Time of those runs one after another (s); None without a measured time."""


def difference_variance(treatment: ArrayLike, baseline: ArrayLike) -> Variance:
    """Components of the variance of paired differences `[S, P]`, none below 0: what `plan` needs, from measured runs.

    Raises:
        ValueError: below two seeds or problems, where no component can be told apart.
    """
    difference = paired_differences(treatment, baseline)
    seeds, problems = difference.shape
    if seeds < 2 or problems < 2:
        raise ValueError(f"variance components need two seeds and two problems, but there are {seeds} and {problems}")
    seed, problem, residual = mean_squares(difference)
    return Variance(max(0.0, (seed - residual) / problems), max(0.0, (problem - residual) / seeds), residual)


def power(effect: float, variance: Variance, *, seeds: int, problems: int, alpha: float = 0.05) -> float:
    """Probability that `paired_benefit` shows a benefit of `effect` (fraction) at level `alpha`; 0 below 3 seeds.

    It is that of the very test, averaged over what the test may estimate: the mean squares are independent multiples of
    chi-square, and standard error, floor and Satterthwaite's degrees of freedom follow from them each time. With the
    degrees of freedom of the expected mean squares instead, three seeds come out too weak (docs/statistics.md).
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
    shown = distributions.norm.sf(bound - shift) + distributions.norm.sf(bound + shift)
    return float(np.einsum("ijk,j,k->", shown, FEW_WEIGHTS, FEW_WEIGHTS) / QUANTILES)


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
    """Seeds that a benefit of `effect` (fraction; 1.5 points is 0.015) needs, one row per size of the test set.

    `comparisons` is the number of benefits in the table, over which Holm's strictest level is `0.05 / comparisons`.

    Raises:
        ValueError: if the effect is not in (0, 1), or a count or the power makes no sense.
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
