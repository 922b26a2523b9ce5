"""How many seeds and problems an effect needs, and what they cost, from runs already made."""

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
"""Variance of a difference where no runs say: seeds differ by 1 point, a fifth of the problems flips."""


@dataclass(frozen=True)
class Variances:
    """Components of the variance of a difference, and where they come from."""

    variance: stats.Variance
    source: str


@dataclass(frozen=True)
class RunTime:
    """What one run costs: a part that does not depend on the test set, and one that does."""

    training: float
    """Seconds without evaluations."""
    problem: float
    """Seconds of all evaluations of a run, for each test problem."""
    source: str

    def seconds(self, problems: int) -> float:
        """Seconds of a run that is scored on so many problems."""
        return self.training + self.problem * problems


def measured_variance(runs: Sequence[Run]) -> Variances:
    """Mean components over all comparisons of the runs that have two seeds or more; assumed ones without any."""
    arms, _ = group_arms(runs)
    found: list[tuple[stats.Variance, int]] = []
    collapsed = 0
    for arm in arms:
        pair = _pair(arm, arms)
        if pair is not None:
            new, old = pair
            found.append((stats.difference_variance(new.deployed, old.deployed), len(new.seeds)))
            collapsed += len(new.collapsed) + len(old.collapsed)
    if not found:
        return Variances(ASSUMED, "assumed, for no comparison of two seeds or more was found: seeds 1 point apart")
    # each component has about one degree of freedom a seed and comparison, less one
    freedom = sum(seeds - 1 for _, seeds in found)
    mean = stats.Variance(
        *(
            sum(getattr(v, part) * (seeds - 1) for v, seeds in found) / freedom
            for part in ("seed", "problem", "residual")
        )
    )
    rough = ", which is rough" if freedom < 10 else ""
    source = (
        f"measured in {words.number(len(found), 'comparison')}: differences of seeds vary by "
        f"{100 * sqrt(mean.seed):.2f} points (standard deviation, {freedom} degrees of freedom{rough})"
    )
    if collapsed:
        source += (
            f"; collapsed runs are among them ({collapsed}, counted for each comparison), which no normal distribution "
            "describes: more seeds than said may be needed"
        )
    return Variances(mean, source)


def measured_time(runs: Sequence[Run]) -> RunTime | None:
    """Mean time of the complete runs that trained, from their steps; None without any that is scored."""
    found: list[tuple[float, float]] = []
    for run in runs:
        if run.is_final and not run.health.untrained:  # without an update a step is cheap
            evaluating = sum(float(row.get("seconds_evaluate", 0.0)) for row in run.metrics)
            whole = sum(float(row.get("seconds", 0.0)) for row in run.metrics)
            problems = len(run.evaluation(run.status.total_steps).outcomes)
            found.append((whole - evaluating, evaluating / problems))
    if not found or not any(training for training, _ in found):
        return None
    training, problem = (sum(part) / len(found) for part in zip(*found, strict=True))
    profiles = ", ".join(dict.fromkeys(run.profile.name for run in runs))
    return RunTime(training, problem, f"measured in {words.number(len(found), 'run')} of profile {profiles}")


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
    """Seeds, runs and time for each size of the test set, for a terminal.

    Args:
        effect: difference to be shown (fraction).
        found: what a difference varies by.
        time: what a run costs, if that is known.
        problems: sizes of the test set.
        power: wanted probability of showing it.
        comparisons: benefits in the table that the result is corrected over.
        workers: runs at a time.
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
    """Outcomes of an arm and of its declared baseline over common seeds; None where there are fewer than two."""
    if arm.experiment.baseline is None:
        return None
    try:
        under = baseline_arm(arm, arms)
        comparison_kind(arm, under)
        new, old = paired_scores(arm, under)
    except ConfigError:
        return None
    return (new, old) if len(new.seeds) > 1 else None
