"""Tests in addition to the interval: equivalence within a margin, McNemar's test of two runs, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from roundoff.stats.intervals import MIN_SEEDS, Interval, paired_benefit, paired_differences, standard_error


@dataclass(frozen=True, slots=True)
class McNemar:
    """Exact McNemar test of one pair of runs. It concerns these two runs, not their settings."""

    gained: int
    """Number of problems that only the treatment solved."""
    lost: int
    """Number of problems that only the baseline solved."""
    p: float
    """Two-sided p-value. Whatever it is, another seed may well give another answer."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Whether a treatment loses less than `margin` against its baseline, and whether it is within `margin` of it."""

    interval: Interval
    """The benefit with its 95 % interval."""
    margin: float
    """The loss that could be borne (fraction)."""
    p_not_worse: float | None
    """One-sided p-value of "the loss is `margin` or more"; None below three seeds."""
    p_equivalent: float | None
    """The larger of the two one-sided p-values (TOST); None below three seeds."""


def equivalence(treatment: ArrayLike, baseline: ArrayLike, margin: float) -> Equivalence:
    """Tests of "the loss is below `margin`" and of "the difference is within `margin`".

    Args:
        treatment: outcomes `[seeds, problems]` of the arm that is judged, in [0, 1].
        baseline: outcomes of the same seeds and problems in the same order.
        margin: the loss that could be borne (fraction, in (0, 1)).

    Raises:
        ValueError: if the shapes differ, an outcome is not a fraction or the margin is not in (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must be in (0, 1) (1 point is 0.01), but is {margin}")
    interval = paired_benefit(treatment, baseline)
    if interval.seeds < MIN_SEEDS:
        return Equivalence(interval, margin, None, None)
    se, df = standard_error(paired_differences(treatment, baseline))
    not_worse = float(distributions.t.sf((interval.estimate + margin) / se, df))
    not_better = float(distributions.t.sf((margin - interval.estimate) / se, df))
    return Equivalence(interval, margin, not_worse, max(not_worse, not_better))


def mcnemar(treatment: ArrayLike, baseline: ArrayLike) -> McNemar:
    """Exact McNemar test of the outcomes `[problems]` of two runs.

    A problem counts as solved if it was solved in more than half of the noise draws.

    Raises:
        ValueError: if the shapes differ or an outcome is not a fraction.
    """
    new, old = np.atleast_1d(np.asarray(treatment, float)), np.atleast_1d(np.asarray(baseline, float))
    if new.ndim != 1 or new.shape != old.shape:
        raise ValueError(
            f"treatment and baseline must be two rows of equal length, but are {new.shape} and {old.shape}"
        )
    for name, row in (("treatment", new), ("baseline", old)):
        if not ((row >= 0) & (row <= 1)).all():
            raise ValueError(f"{name} must be fractions in [0, 1], but range from {row.min()} to {row.max()}")
    gained = int(((new > 0.5) & (old <= 0.5)).sum())
    lost = int(((new <= 0.5) & (old > 0.5)).sum())
    p = float(distributions.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (Holm 1979, Scand. J. Statist. 6:65), in the order given.

    None stands for "not tested": it stays None and does not count as a test.

    Raises:
        ValueError: if a p-value is not in [0, 1].
    """
    for wrong in (p for p in p_values if p is not None and not 0 <= p <= 1):
        raise ValueError(f"p-values must be in [0, 1], or None where nothing was tested, but one is {wrong}")
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = running
    return adjusted
