"""How many seeds and problems an effect needs, and what they cost, from runs that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roundoff import stats
from roundoff.config import ConfigError
from roundoff.report import words
from roundoff.report.arms import Arm, Scores, group_arms
from roundoff.report.assemble import baseline_arm
from roundoff.report.compare import comparison_kind, paired_scores
from roundoff.runs.record import Run

ASSUMED = stats.Variance(seed=1e-4, problem=0.01, residual=0.2)
"""Variance of a difference where no runs show it: seeds differ by 1 point, and a fifth of the problems flips."""
FEW_DEGREES = 10
"""Degrees of freedom below which a measured variance between seeds is rough, and one of zero means nothing."""


@dataclass(frozen=True)
class Variances:
    """Components of the variance of a difference, and where they come from."""

    variance: stats.Variance
    source: str
    """Where they come from, as a phrase without a full stop."""


@dataclass(frozen=True)
class RunTime:
    """The time of one run, in a part that does not depend on the size of the test set and one that does."""

    training: float
    """Seconds without evaluations."""
    problem: float
    """Seconds per test problem of all evaluations of a run together."""
    source: str
    """Where the times come from, as a phrase without a full stop."""

    def seconds(self, problems: int) -> float:
        """Seconds of a run that is scored on this many problems."""
        return self.training + self.problem * problems


def measured_variance(runs: Sequence[Run]) -> Variances:
    """Mean variance components over all comparisons of two seeds or more; assumed ones where there is none.

    A component below zero is cut off at zero, so on few seeds a variance of zero between seeds is common and does not
    mean that seeds agree. It counts as unknown then, and the assumed one takes its place.
    """
    arms, _ = group_arms(runs)
    measured: list[tuple[stats.Variance, int]] = []
    collapsed = 0
    for arm in arms:
        pair = _pair(arm, arms)
        if pair is not None:
            new, old = pair
            measured.append((stats.difference_variance(new.deployed, old.deployed), len(new.seeds)))
            collapsed += len(new.collapsed) + len(old.collapsed)
    if not measured:
        return Variances(ASSUMED, "assumed, because no comparison of two seeds or more was found: seeds 1 point apart")
    # Each comparison gives its components about one degree of freedom per seed, less one.
    freedom = sum(seeds - 1 for _, seeds in measured)
    mean = stats.Variance(
        *(
            sum(getattr(v, part) * (seeds - 1) for v, seeds in measured) / freedom
            for part in ("seed", "problem", "residual")
        )
    )
    source = f"measured in {words.number(len(measured), 'comparison')}: "
    degrees = words.number(freedom, "degree") + " of freedom"
    if mean.seed == 0 and freedom < FEW_DEGREES:
        mean = replace(mean, seed=ASSUMED.seed)
        source += (
            f"too few seeds to tell how much their differences vary ({degrees}), so that this is unknown and "
            f"{100 * sqrt(ASSUMED.seed):g} point is assumed"
        )
    else:
        rough = ", which is rough" if freedom < FEW_DEGREES else ""
        source += (
            f"differences of seeds vary by {100 * sqrt(mean.seed):.2f} points (standard deviation, {degrees}{rough})"
        )
    if collapsed:
        source += (
            f"; among them are collapsed runs ({collapsed}, counted in each comparison), which no normal distribution "
            "describes: more seeds than this plan says may be needed"
        )
    return Variances(mean, source)


def measured_time(runs: Sequence[Run]) -> RunTime | None:
    """Mean time of the runs that are complete, scored and trained, from the times of their steps; None without any."""
    times: list[tuple[float, float]] = []
    for run in runs:
        if run.is_final and not run.health.untrained:  # a step without an update would be too cheap
            evaluating = sum(float(row.get("seconds_evaluate", 0.0)) for row in run.metrics)
            stepping = sum(float(row.get("seconds", 0.0)) for row in run.metrics)
            problems = len(run.evaluation(run.status.total_steps).outcomes)
            times.append((stepping - evaluating, evaluating / problems))
    if not times or not any(training for training, _ in times):
        return None
    training, problem = (sum(part) / len(times) for part in zip(*times, strict=True))
    profiles = ", ".join(dict.fromkeys(run.profile.name for run in runs))
    return RunTime(training, problem, f"measured in {words.number(len(times), 'run')} of profile {profiles}")


def seeds_table(
    effect: float,
    found: Variances,
    time: RunTime | None,
    *,
    problems: Sequence[int],
    power: float,
    comparisons: int,
    workers: int,
) -> RenderableType:
    """The seeds, runs and time that each size of the test set needs, as a table for a terminal.

    Args:
        effect: the difference to show (fraction).
        found: the variance of a difference.
        time: the time of a run, or None if it is not known.
        problems: the sizes of the test set, one row each.
        power: the probability with which the difference shall be shown.
        comparisons: the number of benefits that the result is corrected over.
        workers: the number of runs at a time.
    """
    rows = stats.plan(effect, found.variance, problems=problems, wanted_power=power, comparisons=comparisons)
    if time is not None:
        rows = [replace(r, seconds=r.runs * time.seconds(r.problems) if r.runs else None) for r in rows]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    for name in ("Problems", "Seeds an arm", "Runs of both", "Power", "Time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.seeds is None:
            table.add_row(f"{row.problems:,}", "over 50", words.NONE, f"{100 * row.power:.0f} % with 50", words.NONE)
            continue
        cost = words.NONE if row.seconds is None else words.duration(row.seconds / workers)
        table.add_row(f"{row.problems:,}", str(row.seeds), str(row.runs), f"{100 * row.power:.0f} %", cost)
    over = f", corrected over {comparisons} comparisons" if comparisons > 1 else ""
    head = (
        f"To show a difference of {100 * effect:g} points with a probability of {100 * power:g} % "
        f"(two-sided test at 5 %{over}):"
    )
    notes = [f"Variance: {found.source}."]
    if time is not None:
        at = f"; {workers} runs at a time" if workers > 1 else "; one run after another"
        notes.append(f"Time: {time.source}{at}.")
    return Group(Text(head), Text(""), table, Text(""), Text("\n".join(notes), style="dim"))


def _pair(arm: Arm, arms: Sequence[Arm]) -> tuple[Scores, Scores] | None:
    """Scores of an arm and of its declared baseline over their common seeds; None if there are fewer than two."""
    if arm.experiment.baseline is None:
        return None
    try:
        baseline = baseline_arm(arm, arms)
        comparison_kind(arm, baseline)
        new, old = paired_scores(arm, baseline)
    except ConfigError:
        return None
    return (new, old) if len(new.seeds) > 1 else None
