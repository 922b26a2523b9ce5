"""Scores that others published, beside ours and never mixed with them: no figure of this report rests on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roundoff import stats
from roundoff.experiments import Reference, reference_scores

PROBLEMS = 1319
"""Test problems of GSM8K, on which every published score rests, with one run each."""
SETTING = "Qwen2.5-1.5B-Instruct on GSM8K, 1,319 test problems, one run each"


@dataclass(frozen=True)
class Published:
    """What was published for one experiment, with the error of its test set (fractions)."""

    label: str
    """Name that the run was published under; empty where it had none."""
    score: stats.Interval
    """Wilson's interval; it carries no seed variance, for there was one run."""
    difference: stats.Interval | None
    """To the published score of its baseline (Newcombe's interval of two independent test sets)."""


def published(experiment: str, baseline: str | None) -> Published | None:
    """What was published for an experiment of this id, and against its baseline; None where nothing was."""
    known = reference_scores()
    if experiment not in known:
        return None
    score = _interval(known, experiment)
    under = None if baseline is None or baseline not in known else _interval(known, baseline)
    against = None if under is None else stats.unpaired_difference(score, under)
    return Published(known[experiment].label, score, against)


def _interval(known: Mapping[str, Reference], experiment: str) -> stats.Interval:
    return stats.proportion(known[experiment].score_percent / 100, PROBLEMS)
