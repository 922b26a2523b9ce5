"""Intervals, paired tests and power for accuracies measured on a few seeds and many problems.

Outcomes are an array `[seeds, problems]`. Each is the share of noise draws in which the problem was solved, so with one
draw it is 0 or 1. The model has two-way random effects,

    y[s, p] = mean + seed[s] + problem[p] + residual[s, p],

so an interval is for the mean over all seeds and all problems of this kind. It is not for the result of one more run,
which varies more. A benefit is the same model on the differences between two arms, paired by seed and problem.

With S seeds and P problems, the variance of the mean is `(MS_seed + MS_problem - MS_residual) / (S*P)` in mean squares
of the two-way layout. It has Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2:110), and
the interval uses Student's t. Resampling seeds and then problems was tried, and covers worse at few seeds
(docs/statistics.md). At three seeds the interval is widened by `WIDENING_AT_THREE`, without which it rejects a true
null in up to 8 % of cases. Below `MIN_SEEDS` the seed variance cannot be told: there is no p-value, the interval
carries problem variance only, and `Interval.covers` says so.

This package takes arrays and draws no random numbers; runs are grouped and read in `roundoff.report`.

Doors: the names below. They are all in `__all__`.
"""

from roundoff.stats.collapse import collapsed_runs
from roundoff.stats.intervals import (
    LEVEL,
    MIN_SEEDS,
    VARIANCE_FLOOR,
    WIDENING_AT_THREE,
    Interval,
    paired_benefit,
    proportion,
    score,
    unpaired_difference,
    wilson,
)
from roundoff.stats.planning import PlanRow, Variance, difference_variance, plan, power
from roundoff.stats.significance import Equivalence, McNemar, equivalence, holm, mcnemar
from roundoff.stats.weight_growth import Growth, weight_growth

__all__ = [
    "LEVEL",
    "MIN_SEEDS",
    "VARIANCE_FLOOR",
    "WIDENING_AT_THREE",
    "Equivalence",
    "Growth",
    "Interval",
    "McNemar",
    "PlanRow",
    "Variance",
    "collapsed_runs",
    "difference_variance",
    "equivalence",
    "holm",
    "mcnemar",
    "paired_benefit",
    "plan",
    "power",
    "proportion",
    "score",
    "unpaired_difference",
    "weight_growth",
    "wilson",
]
