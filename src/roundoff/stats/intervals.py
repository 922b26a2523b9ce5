"""Estimates with their 95 % interval: a score, a published rate, and a paired or an unpaired difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from roundoff.stats.collapse import collapsed_runs

Array = NDArray[np.float64]

LEVEL = 0.95
"""Coverage of every interval."""
MIN_SEEDS = 3
"""Smallest number of seeds for which anything is tested."""
WIDENING_AT_THREE = 1.08
"""Factor on the standard error at three seeds; with it a true null is rejected in 3.3 to 6.8 % of cases."""
VARIANCE_FLOOR = 0.25
"""Lower bound of the variance of a mean, as a share of what the residual alone gives: by chance the estimate may fall
near zero."""
SMALL = 1e-12
"""Standard errors and variances below this count as zero."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval (fractions), and the p-value of "it is zero" where there is one."""

    estimate: float
    low: float
    high: float
    p: float | None = None
    """Two-sided p-value; None for a score, and for a benefit below three seeds."""
    seeds: int = 0
    problems: int = 0
    collapsed: int = 0
    """Number of runs behind it that collapsed (`collapsed_runs`). Above 0 the seeds form two groups; the interval takes
    them for one and may cover less than 95 %."""

    @property
    def covers(self) -> Literal["seeds and problems", "problems only"]:
        """The variance that the interval carries; that between seeds cannot be estimated below three seeds."""
        return "seeds and problems" if self.seeds >= MIN_SEEDS else "problems only"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval carries seed variance and lies on one side of zero as a whole."""
        return self.seeds >= MIN_SEEDS and (self.low > 0 or self.high < 0)


def score(outcomes: ArrayLike, *, collapsed: int | None = None) -> Interval:
    """Mean outcome with an interval that carries seed and problem variance.

    The interval is Wilson's at the effective number of independent problems, `m*(1 - m)/variance` for a mean m, with
    Student's t. It stays within [0, 1], contains the estimate, and has a width even at scores of 0 or 1.

    Args:
        outcomes: outcomes `[seeds, problems]` in [0, 1].
        collapsed: number of runs known to have collapsed. None looks for them in the outcomes, without their starts.

    Raises:
        ValueError: if an outcome is not a fraction, or there are fewer than two problems.
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
    """Centre and half-width of Wilson's interval of a rate over `n` independent problems (Wilson 1927, JASA 22:209)."""
    shrink = 1 + quantile**2 / n
    half = quantile / shrink * math.sqrt(rate * (1 - rate) / n + quantile**2 / (4 * n * n))
    return (rate + quantile**2 / (2 * n)) / shrink, half


def _bounds(rate: float, n: float, quantile: float) -> tuple[float, float]:
    """Ends of Wilson's interval, kept within [0, 1] and, whatever the rounding, on either side of the rate."""
    centre, half = wilson(rate, n, quantile)
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def proportion(rate: float, problems: int) -> Interval:
    """A published rate of one run over `problems` problems, with Wilson's interval, which carries no seed variance."""
    return Interval(rate, *_bounds(rate, problems, float(distributions.norm.ppf((1 + LEVEL) / 2))), None, 1, problems)


def unpaired_difference(new: Interval, old: Interval) -> Interval:
    """Difference of two independent proportions, with Newcombe's interval and the two-sided p of the score test.

    Source: Newcombe 1998, Statist. Med. 17:873, method 10.
    """
    estimate = new.estimate - old.estimate
    low = estimate - math.hypot(new.estimate - new.low, old.high - old.estimate)
    high = estimate + math.hypot(new.high - new.estimate, old.estimate - old.low)
    pooled = (new.estimate * new.problems + old.estimate * old.problems) / (new.problems + old.problems)
    se = math.sqrt(pooled * (1 - pooled) * (1 / new.problems + 1 / old.problems))
    p = float(2 * distributions.norm.sf(abs(estimate) / se)) if se > 0 else 1.0
    return Interval(estimate, low, high, p, 1, min(new.problems, old.problems))


def paired_benefit(treatment: ArrayLike, baseline: ArrayLike, *, collapsed: int | None = None) -> Interval:
    """Mean of treatment minus baseline, paired by seed and problem.

    Args:
        treatment: outcomes `[seeds, problems]` of the arm that is judged, in [0, 1].
        baseline: outcomes of the arm that it is judged against, with the same seeds and problems in the same order.
        collapsed: number of runs of both arms known to have collapsed. None looks for them in the outcomes, without
            their starts.

    Raises:
        ValueError: if the shapes differ, an outcome is not a fraction, or there are fewer than two problems.
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


def checked(values: ArrayLike, name: str, *, low: float) -> Float64[Array, "seeds problems"]:
    """The values as an array of outcomes.

    Raises:
        ValueError: if they have another number of axes or one is not in [`low`, 1]; the message calls them `name`.
    """
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 2 or not y.size:
        raise ValueError(f"{name} must be [seeds, problems] with at least one of each, but have shape {y.shape}")
    if not (np.isfinite(y).all() and y.min() >= low and y.max() <= 1):
        raise ValueError(f"{name} must be fractions in [{low:g}, 1], but range from {y.min()} to {y.max()}")
    return y


def paired_differences(treatment: ArrayLike, baseline: ArrayLike) -> Float64[Array, "seeds problems"]:
    """Treatment minus baseline, outcome by outcome.

    Raises:
        ValueError: if the shapes differ or an outcome is not a fraction.
    """
    new, old = checked(treatment, "treatment", low=0.0), checked(baseline, "baseline", low=0.0)
    if new.shape != old.shape:
        raise ValueError(f"treatment and baseline must pair by seed and problem, but are {new.shape} and {old.shape}")
    return new - old


def mean_squares(y: Float64[Array, "seeds problems"]) -> tuple[float, float, float]:
    """Mean squares of seeds, problems and residual in a two-way layout of at least 2 seeds and 2 problems."""
    seeds, problems = y.shape
    rows, columns, mean = y.mean(axis=1), y.mean(axis=0), y.mean()
    seed = problems * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    problem = seeds * float(((columns - mean) ** 2).sum()) / (problems - 1)
    rest = y - rows[:, None] - columns[None, :] + mean
    return seed, problem, float((rest**2).sum()) / ((seeds - 1) * (problems - 1))


def combined(
    squares: tuple[Float64[Array, "*shape"], Float64[Array, "*shape"], Float64[Array, "*shape"]],
    seeds: int,
    problems: int,
) -> tuple[Float64[Array, "*shape"], Float64[Array, "*shape"]]:
    """Variance of a mean, times `seeds * problems`, and its degrees of freedom, element by element.

    The degrees of freedom are Satterthwaite's, but at least `seeds - 1`.

    Args:
        squares: mean squares of seeds, problems and residual.
        seeds: number of seeds behind them.
        problems: number of problems behind them.
    """
    seed, problem, residual = squares
    total = np.maximum(seed + problem - residual, VARIANCE_FLOOR * residual)
    spread = seed**2 / (seeds - 1) + problem**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
    df = np.divide(total**2, spread, out=np.zeros_like(total), where=spread > 0)
    return total, np.maximum(df, seeds - 1.0)


def standard_error(y: Float64[Array, "seeds problems"]) -> tuple[float, float]:
    """Standard error of the mean and its degrees of freedom; below three seeds it carries problem variance only.

    Raises:
        ValueError: if there are fewer than two problems.
    """
    seeds, problems = y.shape
    if problems < 2:
        raise ValueError("an interval needs at least two problems")
    # Where nothing varies, the observed variance of zero is too small: by the rule of three (a Wilson-type bound), an
    # event that was not seen in P problems may still have a rate of 1 - 0.025^(1/P).
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
