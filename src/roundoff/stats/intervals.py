"""Estimates with their 95 % interval: of a score, of a published rate, and of a paired or unpaired difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from roundoff.stats.collapse import collapsed_runs

Array = NDArray[np.float64]

LEVEL = 0.95
"""Coverage of every interval."""
MIN_SEEDS = 3
"""Fewest seeds for which anything is tested."""
WIDENING_AT_THREE = 1.08
"""Factor on the standard error at three seeds, which keeps the rejection rate of a true null at 3.3 to 6.8 %."""
VARIANCE_FLOOR = 0.25
"""Least variance of a mean, as a share of what its residual alone gives: the estimate may fall near zero by chance."""
SMALL = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval (fractions), and the p-value of "it is zero" where one can be given."""

    estimate: float
    low: float
    high: float
    p: float | None = None
    """Two-sided; None for a score, and for a benefit below three seeds."""
    seeds: int = 0
    problems: int = 0
    collapsed: int = 0
    """Runs behind it that collapsed (`collapsed_runs`). Above 0 the seeds form two groups, and the interval, which
    takes them for one, may cover less than 95 %."""

    @property
    def covers(self) -> Literal["seeds and problems", "problems only"]:
        """Which variance the interval carries: seed variance cannot be told from fewer than three seeds."""
        return "seeds and problems" if self.seeds >= MIN_SEEDS else "problems only"

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero, and seed variance is part of it."""
        return self.seeds >= MIN_SEEDS and (self.low > 0 or self.high < 0)


def score(outcomes: ArrayLike, *, collapsed: int | None = None) -> Interval:
    """Mean outcome with an interval that carries seed and problem variance, for outcomes `[S, P]` in [0, 1].

    Wilson's interval at the effective number of independent problems `m*(1 - m)/variance`, with Student's t: it stays
    within [0, 1], holds the estimate and keeps a width at scores of 0 or 1.

    Args:
        outcomes: by seed and problem.
        collapsed: runs known to have collapsed; None: found from the outcomes alone, without their starts.
    """
    y = checked(outcomes, "outcomes", low=0.0)
    mean, (seeds, problems) = float(y.mean()), y.shape
    se, df = standard_error(y)
    t = float(distributions.t.ppf((1 + LEVEL) / 2, df))
    spread = mean * (1 - mean)
    n = max(spread / se**2, 1.0) if se > SMALL and spread > SMALL else float(problems)
    count = len(collapsed_runs(y.mean(axis=1), problems=problems)) if collapsed is None else collapsed
    return Interval(mean, *_bounds(mean, n, t), None, seeds, problems, count)


def wilson(rate: float, n: float, quantile: float) -> tuple[float, float]:
    """Centre and half-width of Wilson's interval of a rate over `n` independent problems (1927, JASA 22:209)."""
    shrink = 1 + quantile**2 / n
    half = quantile / shrink * math.sqrt(rate * (1 - rate) / n + quantile**2 / (4 * n * n))
    return (rate + quantile**2 / (2 * n)) / shrink, half


def _bounds(rate: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval within [0, 1]; rounding may leave no end on the wrong side of the rate."""
    centre, half = wilson(rate, n, quantile)
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def proportion(rate: float, problems: int) -> Interval:
    """A published rate over `problems` problems of one run, with Wilson's interval: no seed variance is in it."""
    return Interval(rate, *_bounds(rate, problems, float(distributions.norm.ppf((1 + LEVEL) / 2))), None, 1, problems)


def unpaired_difference(new: Interval, old: Interval) -> Interval:
    """Difference of two proportions that nothing pairs: Newcombe's interval, and the two-sided p of the score test.

    Newcombe 1998, Statist. Med. 17:873, method 10.
    """
    estimate = new.estimate - old.estimate
    low = estimate - math.hypot(new.estimate - new.low, old.high - old.estimate)
    high = estimate + math.hypot(new.high - new.estimate, old.estimate - old.low)
    pooled = (new.estimate * new.problems + old.estimate * old.problems) / (new.problems + old.problems)
    se = math.sqrt(pooled * (1 - pooled) * (1 / new.problems + 1 / old.problems))
    p = float(2 * distributions.norm.sf(abs(estimate) / se)) if se > 0 else 1.0
    return Interval(estimate, low, high, p, 1, min(new.problems, old.problems))


def paired_benefit(treatment: ArrayLike, baseline: ArrayLike, *, collapsed: int | None = None) -> Interval:
    """Mean of treatment minus baseline, both `[S, P]` with the same seeds and problems in the same order.

    Args:
        treatment: outcomes of what is judged.
        baseline: outcomes of what it is judged against.
        collapsed: runs of either known to have collapsed; None: found from the outcomes alone, without their starts.

    Raises:
        ValueError: if the shapes differ or an outcome is no fraction.
    """
    difference = paired_differences(treatment, baseline)
    estimate, (seeds, problems) = float(difference.mean()), difference.shape
    se, df = standard_error(difference)
    half = float(distributions.t.ppf((1 + LEVEL) / 2, df)) * se
    p = float(2 * distributions.t.sf(abs(estimate) / se, df)) if seeds >= MIN_SEEDS else None
    if collapsed is None:
        means = (np.asarray(arm, dtype=np.float64).mean(axis=1) for arm in (treatment, baseline))
        collapsed = sum(len(collapsed_runs(scores, problems=problems)) for scores in means)
    return Interval(estimate, max(-1.0, estimate - half), min(1.0, estimate + half), p, seeds, problems, collapsed)


def checked(values: ArrayLike, name: str, *, low: float) -> Array:
    """Outcomes as an array `[S, P]`; a ValueError says by name what is no fraction in [`low`, 1]."""
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 2 or not y.size:
        raise ValueError(f"{name} must be [seeds, problems] with at least one of each, but have shape {y.shape}")
    if not (np.isfinite(y).all() and y.min() >= low and y.max() <= 1):
        raise ValueError(f"{name} must be fractions in [{low:g}, 1], but range from {y.min()} to {y.max()}")
    return y


def paired_differences(treatment: ArrayLike, baseline: ArrayLike) -> Array:
    """Treatment minus baseline `[S, P]`; a ValueError where they do not pair."""
    new, old = checked(treatment, "treatment", low=0.0), checked(baseline, "baseline", low=0.0)
    if new.shape != old.shape:
        raise ValueError(f"treatment and baseline must pair by seed and problem, but are {new.shape} and {old.shape}")
    return new - old


def mean_squares(y: Array) -> tuple[float, float, float]:
    """Mean squares of seeds, problems and residual of a two-way layout `[S, P]`, S and P at least 2."""
    seeds, problems = y.shape
    rows, columns, mean = y.mean(axis=1), y.mean(axis=0), y.mean()
    seed = problems * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    problem = seeds * float(((columns - mean) ** 2).sum()) / (problems - 1)
    rest = y - rows[:, None] - columns[None, :] + mean
    return seed, problem, float((rest**2).sum()) / ((seeds - 1) * (problems - 1))


def combined(squares: tuple[Array, Array, Array], seeds: int, problems: int) -> tuple[Array, Array]:
    """Variance of a mean, times S*P, with Satterthwaite's degrees of freedom, which are at least `seeds - 1`.

    For three mean squares of any one shape, element by element.
    """
    seed, problem, residual = squares
    total = np.maximum(seed + problem - residual, VARIANCE_FLOOR * residual)
    spread = seed**2 / (seeds - 1) + problem**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
    df = np.divide(total**2, spread, out=np.zeros_like(total), where=spread > 0)
    return total, np.maximum(df, seeds - 1.0)


def standard_error(y: Array) -> tuple[float, float]:
    """Standard error of the mean of `[S, P]` and its degrees of freedom; problems only below three seeds."""
    seeds, problems = y.shape
    if problems < 2:
        raise ValueError("an interval needs at least two problems")
    # Where nothing varies, the observed variance of zero is too good: by the rule of three (a Wilson-type bound), an
    # event not seen in P problems may have a rate of 1 - 0.025^(1/P).
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / problems)
    if seeds < MIN_SEEDS:
        se, df = math.sqrt(float(y.mean(axis=0).var(ddof=1)) / problems), problems - 1.0
    else:
        seed, problem, residual = (np.array([square]) for square in mean_squares(y))
        (total,), (df,) = combined((seed, problem, residual), seeds, problems)
        se = math.sqrt(total / (seeds * problems)) * (WIDENING_AT_THREE if seeds == MIN_SEEDS else 1.0)
    if se > SMALL:
        return se, float(df)
    return unseen / float(distributions.t.ppf((1 + LEVEL) / 2, problems - 1.0)), problems - 1.0
