"""Intervals, paired tests and power for accuracies measured on a few seeds and many problems.

Outcomes are an array `[S, P]`: seed by problem, each the share of noise draws in which the problem was solved (0 or 1
with one draw). The model is two-way random effects,

    y[s, p] = mean + seed[s] + problem[p] + residual[s, p],

so an interval is for the mean over all seeds and all problems of this kind, and not for what these runs would give
again; a single further run varies more. A benefit is the same model on the differences between two arms, paired by
seed and problem.

The variance of the mean is `(MS_seed + MS_problem - MS_residual) / (S*P)` in mean squares of the two-way layout, with
Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2:110) and Student's t. Resampling seeds and
then problems was tried and covers worse at few seeds (docs/statistics.md). At three seeds the interval is widened by
`WIDENING_AT_THREE`, without which it rejects a true null in up to 8 % of cases. Below `MIN_SEEDS` there is no p-value:
the seed variance cannot be told, the interval carries problem variance only, and `Interval.covers` says so. No random
numbers are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

Array = NDArray[np.float64]

LEVEL = 0.95
"""Coverage of every interval."""
MIN_SEEDS = 3
"""Fewest seeds for which anything is tested."""
WIDENING_AT_THREE = 1.08
"""Factor on the standard error at three seeds, which keeps the rejection rate of a true null at 3.3 to 6.8 %."""
VARIANCE_FLOOR = 0.25
"""Least variance of a mean, as a share of what its residual alone gives: the estimate may fall near zero by chance."""
QUANTILES = 2000
"""Quantiles of the estimated variance over which power is averaged: exact to about 1e-4."""
_SMALL = 1e-12


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

    @property
    def covers(self) -> Literal["seeds and problems", "problems only"]:
        """Which variance the interval carries: seed variance cannot be told from fewer than three seeds."""
        return "seeds and problems" if self.seeds >= MIN_SEEDS else "problems only"

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero, and seed variance is part of it."""
        return self.seeds >= MIN_SEEDS and (self.low > 0 or self.high < 0)


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
class McNemar:
    """Exact McNemar test of one pair of runs: about these two runs, not about their settings."""

    gained: int
    """Problems that the treatment alone solved."""
    lost: int
    """Problems that the baseline alone solved."""
    p: float
    """Two-sided; another seed may well give another answer, whatever this is."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Whether a treatment is not worse than its baseline by `margin`, and whether it is within `margin` of it."""

    interval: Interval
    """Benefit with its 95 % interval."""
    margin: float
    p_not_worse: float | None
    """One-sided p of "the loss is `margin` or more"; None below three seeds."""
    p_equivalent: float | None
    """Larger of the two one-sided p-values (TOST); None below three seeds."""


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


def score(outcomes: ArrayLike) -> Interval:
    """Mean outcome with an interval that carries seed and problem variance, for outcomes `[S, P]` in [0, 1].

    Wilson's interval at the effective number of independent problems `m*(1 - m)/variance`, with Student's t: it stays
    within [0, 1] and does not collapse at scores of 0 or 1.
    """
    y = _checked(outcomes, "outcomes", low=0.0)
    mean, (seeds, problems) = float(y.mean()), y.shape
    se, df = _standard_error(y)
    t = float(distributions.t.ppf((1 + LEVEL) / 2, df))
    spread = mean * (1 - mean)
    n = max(spread / se**2, 1.0) if se > _SMALL and spread > _SMALL else float(problems)
    centre, half = wilson(mean, n, t)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half), None, seeds, problems)


def wilson(rate: float, n: float, quantile: float) -> tuple[float, float]:
    """Centre and half-width of Wilson's interval of a rate over `n` independent problems (1927, JASA 22:209)."""
    shrink = 1 + quantile**2 / n
    half = quantile / shrink * math.sqrt(rate * (1 - rate) / n + quantile**2 / (4 * n * n))
    return (rate + quantile**2 / (2 * n)) / shrink, half


def proportion(rate: float, problems: int) -> Interval:
    """A published rate over `problems` problems of one run, with Wilson's interval: no seed variance is in it."""
    centre, half = wilson(rate, problems, float(distributions.norm.ppf((1 + LEVEL) / 2)))
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half), None, 1, problems)


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


def paired_benefit(treatment: ArrayLike, baseline: ArrayLike) -> Interval:
    """Mean of treatment minus baseline, both `[S, P]` with the same seeds and problems in the same order.

    Raises:
        ValueError: if the shapes differ or an outcome is no fraction.
    """
    difference = _differences(treatment, baseline)
    estimate, (seeds, problems) = float(difference.mean()), difference.shape
    se, df = _standard_error(difference)
    half = float(distributions.t.ppf((1 + LEVEL) / 2, df)) * se
    p = float(2 * distributions.t.sf(abs(estimate) / se, df)) if seeds >= MIN_SEEDS else None
    return Interval(estimate, max(-1.0, estimate - half), min(1.0, estimate + half), p, seeds, problems)


def equivalence(treatment: ArrayLike, baseline: ArrayLike, margin: float) -> Equivalence:
    """Tests of "the loss is below `margin`" and "the difference is within `margin`" (fraction, above 0).

    Raises:
        ValueError: if the shapes differ, an outcome is no fraction or the margin is not in (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must be in (0, 1) (1 point is 0.01), but is {margin}")
    interval = paired_benefit(treatment, baseline)
    if interval.seeds < MIN_SEEDS:
        return Equivalence(interval, margin, None, None)
    se, df = _standard_error(_differences(treatment, baseline))
    not_worse = float(distributions.t.sf((interval.estimate + margin) / se, df))
    not_better = float(distributions.t.sf((margin - interval.estimate) / se, df))
    return Equivalence(interval, margin, not_worse, max(not_worse, not_better))


def mcnemar(treatment: ArrayLike, baseline: ArrayLike) -> McNemar:
    """Exact McNemar test of two runs' outcomes `[P]`; a problem counts as solved if more than half of the draws did.

    Raises:
        ValueError: if the shapes differ or an outcome is no fraction.
    """
    new, old = np.atleast_1d(np.asarray(treatment, float)), np.atleast_1d(np.asarray(baseline, float))
    if new.ndim != 1 or new.shape != old.shape:
        raise ValueError(
            f"treatment and baseline must be two rows of equal length, but are {new.shape} and {old.shape}"
        )
    gained = int(((new > 0.5) & (old <= 0.5)).sum())
    lost = int(((new <= 0.5) & (old > 0.5)).sum())
    p = float(distributions.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (Holm 1979, Scand. J. Statist. 6:65), in the given order; None stays None, uncounted."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = running
    return adjusted


def difference_variance(treatment: ArrayLike, baseline: ArrayLike) -> Variance:
    """Components of the variance of paired differences `[S, P]`, none below 0: what `plan` needs, from measured runs.

    Raises:
        ValueError: below two seeds or problems, where no component can be told apart.
    """
    difference = _differences(treatment, baseline)
    seeds, problems = difference.shape
    if seeds < 2 or problems < 2:
        raise ValueError(f"variance components need two seeds and two problems, but there are {seeds} and {problems}")
    seed, problem, residual = _mean_squares(difference)
    return Variance(max(0.0, (seed - residual) / problems), max(0.0, (problem - residual) / seeds), residual)


def power(effect: float, variance: Variance, *, seeds: int, problems: int, alpha: float = 0.05) -> float:
    """Probability that `paired_benefit` finds a benefit of `effect` (fraction) at level `alpha`; 0 below 3 seeds."""
    if seeds < MIN_SEEDS:
        return 0.0
    residual = max(variance.residual, _SMALL)
    squares = (problems * variance.seed + residual, seeds * variance.problem + residual, residual)
    total, df = _combined(squares, seeds, problems)
    se = math.sqrt(total / (seeds * problems))
    critical = float(distributions.t.ppf(1 - alpha / 2, df)) * (WIDENING_AT_THREE if seeds == MIN_SEEDS else 1.0)
    # P(|T| > critical) of a noncentral t as the mean over the estimated standard error; scipy's own gives NaN far out
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    bound = critical * np.sqrt(distributions.chi2.ppf(quantiles, df) / df)
    shift = abs(effect) / se
    return float(np.mean(distributions.norm.sf(bound - shift) + distributions.norm.sf(bound + shift)))


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


def _checked(values: ArrayLike, name: str, *, low: float) -> Array:
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 2 or not y.size:
        raise ValueError(f"{name} must be [seeds, problems] with at least one of each, but have shape {y.shape}")
    if not (np.isfinite(y).all() and y.min() >= low and y.max() <= 1):
        raise ValueError(f"{name} must be fractions in [{low:g}, 1], but range from {y.min()} to {y.max()}")
    return y


def _differences(treatment: ArrayLike, baseline: ArrayLike) -> Array:
    new, old = _checked(treatment, "treatment", low=0.0), _checked(baseline, "baseline", low=0.0)
    if new.shape != old.shape:
        raise ValueError(f"treatment and baseline must pair by seed and problem, but are {new.shape} and {old.shape}")
    return new - old


def _mean_squares(y: Array) -> tuple[float, float, float]:
    """Mean squares of seeds, problems and residual of a two-way layout `[S, P]`, S and P at least 2."""
    seeds, problems = y.shape
    rows, columns, mean = y.mean(axis=1), y.mean(axis=0), y.mean()
    seed = problems * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    problem = seeds * float(((columns - mean) ** 2).sum()) / (problems - 1)
    rest = y - rows[:, None] - columns[None, :] + mean
    return seed, problem, float((rest**2).sum()) / ((seeds - 1) * (problems - 1))


def _combined(squares: tuple[float, float, float], seeds: int, problems: int) -> tuple[float, float]:
    """Variance of a mean, times S*P, with Satterthwaite's degrees of freedom, which are at least `seeds - 1`."""
    seed, problem, residual = squares
    total = max(seed + problem - residual, VARIANCE_FLOOR * residual)
    spread = seed**2 / (seeds - 1) + problem**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
    return total, max(total**2 / spread, seeds - 1.0) if spread > 0 else seeds - 1.0


def _standard_error(y: Array) -> tuple[float, float]:
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
        total, df = _combined(_mean_squares(y), seeds, problems)
        se = math.sqrt(total / (seeds * problems)) * (WIDENING_AT_THREE if seeds == MIN_SEEDS else 1.0)
    if se > _SMALL:
        return se, df
    return unseen / float(distributions.t.ppf((1 + LEVEL) / 2, problems - 1.0)), problems - 1.0
