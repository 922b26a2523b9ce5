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

__all__ = [
    "LEVEL",
    "MIN_SEEDS",
    "VARIANCE_FLOOR",
    "WIDENING_AT_THREE",
    "Equivalence",
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
    "wilson",
]
