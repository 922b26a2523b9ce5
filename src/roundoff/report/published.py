"""Scores that others published, which are shown beside ours; no figure of the report is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roundoff import stats
from roundoff.experiments import Reference, reference_scores

PROBLEMS = 1319
"""Number of GSM8K's test problems, over which every published score was measured in one run."""
SETTING = f"Qwen2.5-1.5B-Instruct on GSM8K, {PROBLEMS:,} test problems, one run each"
"""What the published scores were measured on, in words."""


@dataclass(frozen=True)
class Published:
    """The published score of one experiment, with the sampling error of its test set (fractions)."""

    label: str
    """Name under which the run was published; empty if it had none."""
    score: stats.Interval
    """The score with Wilson's interval, which carries no seed variance, because there was only one run."""
    difference: stats.Interval | None
    """Difference to the published score of its baseline, with Newcombe's interval of two independent test sets."""


def published(experiment: str, baseline: str | None) -> Published | None:
    """The published score of this experiment, with its difference to that of its baseline; None if there is none."""
    references = reference_scores()
    if experiment not in references:
        return None
    score = _interval(references, experiment)
    base = None if baseline is None or baseline not in references else _interval(references, baseline)
    difference = None if base is None else stats.unpaired_difference(score, base)
    return Published(references[experiment].label, score, difference)


def _interval(references: Mapping[str, Reference], experiment: str) -> stats.Interval:
    return stats.proportion(references[experiment].score_percent / 100, PROBLEMS)
