"""Runs that collapsed, beside which a mean over seeds stands for nothing that a single run would give.

The scores of an arm are then two groups, and an interval that takes them for one covers less than it says: no interval
can carry a second group that a few seeds happened not to show. So the groups are looked for, and said.

A run counts as collapsed if both hold.

1. It is down: it ends below where training began, by 5 points and by three standard errors of the test set at least,
   or at less than half the score of the best run.
2. It is apart: it lies below the lowest run that is not down, by 10 points, by three standard errors of a difference
   and by the range of the runs that are not down, whichever is most.

The rule says nothing of fewer than three runs, nor of an arm of which every run is down: that is one group, whose low
score shows for itself. Its rates of false and of missed alarms are in docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

FEWEST_RUNS = 3
"""Fewest runs in which one can be told to be apart from the others."""
FALL = 0.05
"""Least fall below the start that counts (fraction)."""
BELOW_BEST = 0.5
"""Share of the best run's score below which a run is down even where its start is not known."""
GAP = 0.1
"""Least distance to the runs that are not down (fraction)."""
STANDARD_ERRORS = 3.0
"""Standard errors of the test set by which a run must lie below its start, and below the other runs."""


def collapsed_runs(
    scores: ArrayLike, *, problems: int, starts: Sequence[float | None] | None = None
) -> tuple[int, ...]:
    """Indices, ascending, of the runs that collapsed, from the scores `[S]` of an arm's runs (fractions).

    Args:
        scores: deployed score of each run after training.
        problems: problems behind each score.
        starts: deployed score of each run before training, None where it was not measured. All runs of an arm start
            from one model, so that their median stands for each.
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
