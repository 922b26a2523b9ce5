"""The report as data: one row an arm, comparisons with Holm's correction, curves, flips, provenance.

Everything comes from run directories. Only the last evaluation of complete runs is scored; the headline is the deployed
score. Runs that are missing, failed, running or ended early are listed as such and enter no score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from roundoff import stats
from roundoff.config import ConfigError, Experiment
from roundoff.report.aqn_table import AqnRow, aqn_row
from roundoff.report.arms import Arm, group_arms, start_scores
from roundoff.report.compare import ALPHA, Comparison, Kind, compare_arms, comparison_kind, paired_scores
from roundoff.report.curves import DIAGNOSTICS, Curve, seed_curve, sigma_curve
from roundoff.report.flips import Flips, find_flips
from roundoff.report.published import Published, published
from roundoff.report.scans import Scan, find_scans
from roundoff.report.settings import Settings, settings_in_words
from roundoff.report.sources import Source, find_sources
from roundoff.report.status import SeedRow, arm_notes, arm_status, seed_row
from roundoff.runs.health import Tally
from roundoff.runs.record import Run


@dataclass(frozen=True)
class Row:
    """One arm of the table, or a declared experiment without runs."""

    id: str
    title: str
    family: str
    key: str
    """Name unique in the report; also the anchor in the page."""
    baseline: str | None
    settings: Settings
    seeds: tuple[SeedRow, ...]
    status: str
    is_whole: bool
    """Whether every run is complete and scored, and no seed that its family has is missing."""
    start: float | None
    deployed: stats.Interval | None
    clean: stats.Interval | None
    truncated: float | None
    flaws: Tally | None
    """What was wrong with the responses with the hardware on in the last evaluations."""
    notes: tuple[str, ...]
    """What a reader must know beside its score, a sentence each: what of it was not computed."""
    collapsed: tuple[int, ...]
    """Seeds of the runs that collapsed: their intervals take two groups for one."""
    comparison: Comparison | None
    no_comparison: str
    """Why there is none; empty where there is one or none was declared."""
    is_best: bool
    """Whether it beats every other arm of its family on the same hardware, each difference excluding zero."""
    best_over_collapsed: int
    """Runs that collapsed in the comparisons that make it the best; 0 where it is not."""
    learning: Curve | None
    sigma: Curve | None
    diagnostics: dict[str, Curve]
    flips: Flips | None
    aqn: AqnRow | None
    published: Published | None
    """What others published for an experiment of this id: shown beside, never used."""

    @property
    def name(self) -> str:
        """What to call it in a text."""
        return self.title or self.id


@dataclass(frozen=True)
class Report:
    """Everything that the written report says."""

    rows: tuple[Row, ...]
    sources: tuple[Source, ...]
    skipped: tuple[str, ...]
    """Directories that could not be used, each with the reason."""
    tests: int
    """Comparisons tested, over which Holm's correction runs."""
    updated: str
    """When a run last changed (UTC)."""
    scans: tuple[Scan, ...] = ()
    """The SRDD scans that runs rest on, each different one once."""

    @property
    def families(self) -> dict[str, tuple[Row, ...]]:
        """Rows by family, in order of appearance."""
        found: dict[str, tuple[Row, ...]] = {}
        for row in self.rows:
            found[row.family] = (*found.get(row.family, ()), row)
        return found

    @property
    def runs(self) -> int:
        """Runs listed, in whatever state."""
        return sum(len(row.seeds) for row in self.rows)

    @property
    def scored(self) -> tuple[Row, ...]:
        """Rows that have a score."""
        return tuple(row for row in self.rows if row.deployed)


def build_report(runs: Iterable[Run], skipped: Sequence[str] = (), experiments: Sequence[Experiment] = ()) -> Report:
    """The report over `runs`; `experiments` that were declared and have no run are listed as missing."""
    found = list(runs)
    arms, left_out = group_arms(found)
    arms = _in_declared_order(arms, experiments)
    compared = [_compared(arm, arms) for arm in arms]
    corrected = _corrected([comparison for comparison, _ in compared])
    best = _best(arms)
    rows = [
        _row(arm, arms, comparison, reason, best.get(arm.key))
        for arm, comparison, (_, reason) in zip(arms, corrected, compared, strict=True)
    ]
    known = {arm.experiment.id for arm in arms}
    rows += [_missing(experiment) for experiment in experiments if experiment.id not in known]
    scans, damaged = find_scans(arms)
    return Report(
        rows=tuple(rows),
        sources=find_sources(found),
        skipped=(*skipped, *left_out, *damaged),
        tests=max((c.tests for c in corrected if c), default=0),
        updated=max((run.status.updated for run in found), default=""),
        scans=scans,
    )


def baseline_arm(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm that `arm` declares as its baseline: same profile, whatever its directory.

    Of several that carry the id (its settings were changed between the runs) it is the one that can be compared.

    Raises:
        ConfigError: if no run of it was found, or several could be meant.
    """
    candidates = [other for other in arms if other.experiment.id == arm.experiment.baseline]
    same = [other for other in candidates if _scale(other) == _scale(arm)]
    fit = [other for other in same if _kind(arm, other) is not None]
    if len(fit) > 1:
        places = ", ".join(str(other.runs[0].path.parent) for other in fit)
        raise ConfigError(
            f"its baseline {arm.experiment.baseline} has runs of {len(fit)} settings ({places}): give the report those "
            "that count, or use `roundoff compare`"
        )
    if same:
        return (fit or same)[0]
    if candidates:
        raise ConfigError(f"{arm.experiment.baseline} ran under other profile settings than {arm.experiment.id}")
    raise ConfigError(f"its baseline {arm.experiment.baseline} is not among these runs")


def _kind(arm: Arm, other: Arm) -> Kind | None:
    """What the difference of two arms is; None where it is nothing."""
    try:
        return comparison_kind(arm, other)
    except ConfigError:
        return None


def _scale(arm: Arm) -> str:
    scale = arm.profile.model_dump(mode="json", exclude={"name", "title", "device"})
    scale["task"].pop("directory", None)
    return json.dumps(scale, sort_keys=True)


def _in_declared_order(arms: list[Arm], experiments: Sequence[Experiment]) -> list[Arm]:
    """Declared experiments in their order; others family by family, a baseline before what is measured against it."""
    declared = {experiment.id: i for i, experiment in enumerate(experiments)}
    parents = {arm.experiment.id: arm.experiment.baseline for arm in arms}

    def depth(name: str | None, seen: tuple[str, ...] = ()) -> int:
        return 0 if name is None or name in seen else 1 + depth(parents.get(name), (*seen, name))

    families = list(dict.fromkeys(arm.experiment.family for arm in arms))
    return sorted(
        arms,
        key=lambda a: (
            declared.get(a.experiment.id, len(declared)),
            families.index(a.experiment.family),
            depth(a.experiment.id),
            a.experiment.id,
        ),
    )


def _compared(arm: Arm, arms: Sequence[Arm]) -> tuple[Comparison | None, str]:
    if arm.experiment.baseline is None:
        return None, ""
    try:
        return compare_arms(arm, baseline_arm(arm, arms)), ""
    except ConfigError as error:
        return None, str(error)


def _corrected(comparisons: Sequence[Comparison | None]) -> list[Comparison | None]:
    adjusted = stats.holm([c.deployed.p if c else None for c in comparisons])
    tests = sum(p is not None for p in adjusted)
    return [replace(c, p_holm=p, tests=tests) if c else None for c, p in zip(comparisons, adjusted, strict=True)]


def _best(arms: Sequence[Arm]) -> dict[str, int]:
    """Arms that beat every other arm of their family on the same chip and profile, Holm-corrected.

    By key, with the number of runs in those comparisons that collapsed, its own included.
    """
    best: dict[str, int] = {}
    for arm in arms:
        p_values, leads = [], True
        collapsed = len(arm.scores.collapsed) if arm.scores else 0
        for other in arms:
            if other is arm or not arm.scores or not other.scores or other.experiment.family != arm.experiment.family:
                continue
            if _scale(arm) != _scale(other) or _kind(arm, other) != "benefit":
                continue
            try:
                new, old = paired_scores(arm, other)
            except ConfigError:  # no seed in common: nothing shows which of the two is better
                leads = False
                break
            result = stats.paired_benefit(new.deployed, old.deployed)
            leads &= result.estimate > 0
            collapsed += len(old.collapsed)
            p_values.append(result.p)
        if leads and p_values and all(p is not None and p < ALPHA for p in stats.holm(p_values)):
            best[arm.key] = collapsed
    return best


def _row(arm: Arm, arms: Sequence[Arm], comparison: Comparison | None, reason: str, best: int | None) -> Row:
    seeds = tuple(seed_row(run) for run in arm.runs)
    scores = arm.scores
    starts = [start for start in (start_scores(run)[0] for run in arm.final) if start is not None]
    diagnostics = {key: seed_curve(arm, key) for key in DIAGNOSTICS}
    status, is_whole = arm_status(arm, arms)
    return Row(
        id=arm.experiment.id,
        title=arm.experiment.title,
        family=arm.experiment.family,
        key=arm.key,
        baseline=arm.experiment.baseline,
        settings=settings_in_words(arm.experiment, arm.profile),
        seeds=seeds,
        status=status,
        is_whole=is_whole,
        start=sum(starts) / len(starts) if starts else None,
        deployed=stats.score(scores.deployed, collapsed=len(scores.collapsed)) if scores else None,
        clean=stats.score(scores.clean, collapsed=len(scores.collapsed)) if scores else None,
        truncated=scores.truncated if scores else None,
        flaws=scores.flaws if scores else None,
        notes=arm_notes(arm),
        collapsed=scores.collapsed if scores else (),
        comparison=comparison,
        no_comparison=reason,
        is_best=best is not None,
        best_over_collapsed=best or 0,
        learning=seed_curve(arm, "deployed"),
        sigma=sigma_curve(arm),
        diagnostics={key: curve for key, curve in diagnostics.items() if curve},
        flips=find_flips(arm, baseline_arm(arm, arms)) if comparison else None,
        aqn=aqn_row(arm),
        published=published(arm.experiment.id, arm.experiment.baseline),
    )


def _missing(experiment: Experiment) -> Row:
    return Row(
        id=experiment.id,
        title=experiment.title,
        family=experiment.family,
        key=experiment.id,
        baseline=experiment.baseline,
        settings=settings_in_words(experiment, None),
        seeds=(),
        status=f"missing: `roundoff run {experiment.id}`",
        is_whole=False,
        start=None,
        deployed=None,
        clean=None,
        truncated=None,
        flaws=None,
        notes=(),
        collapsed=(),
        comparison=None,
        no_comparison="it has no run" if experiment.baseline else "",
        is_best=False,
        best_over_collapsed=0,
        learning=None,
        sigma=None,
        diagnostics={},
        flips=None,
        aqn=None,
        published=published(experiment.id, experiment.baseline),
    )
