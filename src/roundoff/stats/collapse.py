"""Finds runs that collapsed: where some did and others did not, no run scores like the mean over seeds.

The scores of such an arm form two groups, and an interval that takes them for one covers less than it says. No interval
can account for a second group that a few seeds happened not to show, so the groups are detected and reported instead.

A run counts as collapsed if both of these hold:

1. It is down. It ends below the score before training, by at least 5 points and by at least three standard errors of
   the test set; or it ends at less than half the score of the best run.
2. It is apart. It lies below the lowest run that is not down by the largest of these: 10 points, three standard errors
   of a difference, and the range of the runs that are not down.

The rule does not apply to fewer than three runs, nor to an arm whose runs are all down: that is one group, and its low
score speaks for itself. The rates of false and missed alarms are in docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

FEWEST_RUNS = 3
"""Fewest runs among which one can be seen to be apart from the others."""
FALL = 0.05
"""Smallest fall below the start that counts (fraction)."""
BELOW_BEST = 0.5
"""A run below this share of the best run's score is down, even if its start is not known."""
GAP = 0.1
"""Smallest distance to the runs that are not down (fraction)."""
STANDARD_ERRORS = 3.0
"""Number of standard errors of the test set by which a run must lie below its start, and below the other runs."""


def collapsed_runs(
    scores: ArrayLike, *, problems: int, starts: Sequence[float | None] | None = None
) -> tuple[int, ...]:
    """Indices of the runs that collapsed, ascending.

    Args:
        scores: deployed score of each run of an arm after training, `[seeds]` (fractions).
        problems: number of problems behind each score.
        starts: deployed score of each run before training, None where it was not measured. All runs of an arm start
            from the same model, so the median of these stands for every run.
    """
    y = np.asarray(scores, dtype=np.float64)
    if len(y) < FEWEST_RUNS:
        return ()
    limit = BELOW_BEST * float(y.max())
    known = [start for start in starts or () if start is not None and math.isfinite(start)]
    if known:
        start = float(np.median(known))
        limit = max(limit, start - max(FALL, STANDARD_ERRORS * math.sqrt(start * (1 - start) / problems)))
    down = y < limit
    if down.all() or not down.any():
        return ()
    others = y[~down]
    lowest = float(others.min())
    error = math.sqrt((lowest * (1 - lowest) + y * (1 - y)).max() / problems)
    apart = max(GAP, STANDARD_ERRORS * error, float(others.max()) - lowest)
    return tuple(int(i) for i in np.flatnonzero(down & (lowest - y >= apart)))
