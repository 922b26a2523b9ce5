"""What the scripts of the studies share: reading a family's runs, and writing tables between the markers of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.table import command_line, put, sources, table
from roundoff import stats
from roundoff.experiments import Evidence, evidence, families, load_experiment
from roundoff.experiments.evidence import FILE, Measured, as_csv
from roundoff.report import words
from roundoff.report.arms import Arm, group_arms
from roundoff.report.assemble import build_report
from roundoff.report.compare import ALPHA, paired_scores
from roundoff.report.contents import Report
from roundoff.runs.files import write_atomic
from roundoff.runs.record import Run, find_runs

__all__ = ["SCORES", "Effect", "Study", "corrected", "effects", "publish", "read_study", "table", "write_evidence"]

Key = TypeVar("Key")
SCORES = ("deployed", "clean")
"""Both scores of an arm: on the hardware, and in plain arithmetic."""


@dataclass(frozen=True)
class Study:
    """The complete runs of one family."""

    runs: tuple[Run, ...]
    arms: dict[str, Arm]
    """Arms with a complete run, by the id of their experiment, in the declared order."""
    report: Report


@dataclass(frozen=True)
class Effect:
    """A paired difference of one score to the declared baseline."""

    interval: stats.Interval
    p_holm: float | None
    """p-value corrected over all effects of the page."""

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero and the corrected p-value is below 5 %."""
        return self.interval.excludes_zero and self.p_holm is not None and self.p_holm < ALPHA

    def __str__(self) -> str:
        text = words.effect_text(self.interval)
        return f"**{text}**" if self.shown else text


def effects(arms: Mapping[str, Arm]) -> dict[tuple[str, str], Effect]:
    """The difference of every arm to its declared baseline, by id and score, Holm-corrected over all of them."""
    found: dict[tuple[str, str], stats.Interval] = {}
    for key, arm in arms.items():
        other = arms.get(arm.experiment.baseline or "")
        if other is None:
            continue
        new, old = paired_scores(arm, other)
        collapsed = len(new.collapsed) + len(old.collapsed)
        for score in SCORES:
            found[key, score] = stats.paired_benefit(getattr(new, score), getattr(old, score), collapsed=collapsed)
    return corrected(found)


def corrected(found: Mapping[Key, stats.Interval]) -> dict[Key, Effect]:
    """Differences with their p-values, Holm-corrected over all of them."""
    adjusted = stats.holm([interval.p for interval in found.values()])
    return {key: Effect(interval, p) for (key, interval), p in zip(found.items(), adjusted, strict=True)}


def read_study(roots: Sequence[Path], family: str) -> Study:
    """The runs of a family below some directories.

    Raises:
        ValueError: if there is no complete run of that family.
    """
    runs, skipped = find_runs(roots)
    mine = tuple(run for run in runs if run.experiment.family == family)
    if not any(run.is_final for run in mine):
        raise ValueError(f"there is no complete run of the family {family} in {', '.join(map(str, roots))}")
    declared = [load_experiment(name) for name in families()[family]]
    arms = {arm.experiment.id: arm for arm in group_arms(mine)[0] if arm.final}
    ordered = {experiment.id: arms[experiment.id] for experiment in declared if experiment.id in arms}
    return Study(mine, ordered, build_report(mine, skipped, declared))


def evidence_of(arms: Mapping[str, Arm], changes: Mapping[tuple[str, str], Effect]) -> Iterator[Evidence]:
    """The rows of evidence of a study: every arm that could be tested against its baseline."""
    for key, arm in arms.items():
        pair = [changes.get((key, score)) for score in SCORES]
        if arm.scores is None or any(effect is None or effect.p_holm is None for effect in pair):
            continue
        yield Evidence(
            experiment=key,
            baseline=arm.experiment.baseline or "",
            profile=arm.profile.name,
            seeds=len(arm.scores.seeds),
            problems=len(arm.scores.problems),
            tests=sum(effect.p_holm is not None for effect in changes.values()),
            deployed=_measured(pair[0]),
            clean=_measured(pair[1]),
        )


def _measured(effect: Effect | None) -> Measured:
    assert effect is not None and effect.p_holm is not None
    i = effect.interval
    return Measured(100 * i.estimate, 100 * i.low, 100 * i.high, effect.p_holm)


def write_evidence(family: str, profile: str, rows: Iterable[Evidence], path: Path = FILE) -> None:
    """Replace a study's rows in the packaged table; those of other studies and scales stay."""
    mine = set(families()[family])
    others = [row for row in evidence() if not (row.experiment in mine and row.profile == profile)]
    write_atomic(path, as_csv([*others, *rows]))


Document = Callable[[Mapping[str, Arm], Mapping[tuple[str, str], Effect]], Iterable[str]]
"""The lines of a study's tables, from its arms and effects."""


def publish(family: str, document: Document, arguments: Sequence[str]) -> tuple[Study, Path | None]:
    """Print a study's tables, or put them between the markers of the page after `--out`, and its rows of evidence.

    Returns:
        The study, and the page; None if the tables were printed.
    """
    roots, out = command_line(arguments)
    study = read_study(roots, family)
    changes = effects(study.arms)
    put("\n".join([*sources(study.report, study.runs), *tests_line(changes), *document(study.arms, changes)]), out)
    if out is not None:
        write_evidence(family, "tiny", evidence_of(study.arms, changes))
    return study, out


def tests_line(changes: Mapping[tuple[str, str], Effect]) -> Iterator[str]:
    """How many tests there are, and what bold means."""
    yield f"{len(changes)} tests; what is shown at 5 % after Holm's correction over all of them stands in bold."
    yield ""
