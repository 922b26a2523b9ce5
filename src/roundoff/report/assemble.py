"""Builds the report as data: a row per arm, comparisons with Holm's correction, curves, flips, and provenance.

Everything comes from run directories. Only the last evaluation of complete runs is scored, and the headline is the
deployed score. Runs that are missing, failed, running or ended early are listed as such and do not count in any score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from roundoff import stats
from roundoff.config import ConfigError, Experiment
from roundoff.report.aqn_table import aqn_row
from roundoff.report.arms import Arm, group_arms, start_scores
from roundoff.report.compare import ALPHA, Comparison, Kind, compare_arms, comparison_kind, paired_scores
from roundoff.report.contents import Report, Row, qualified
from roundoff.report.curves import CORRECTIONS, DIAGNOSTICS, seed_curve, sigma_curve
from roundoff.report.flips import find_flips
from roundoff.report.published import published
from roundoff.report.scans import find_scans
from roundoff.report.settings import settings_in_words
from roundoff.report.sources import find_sources
from roundoff.report.status import arm_notes, arm_status, seed_row
from roundoff.runs.record import Run


def build_report(runs: Iterable[Run], skipped: Sequence[str] = (), experiments: Sequence[Experiment] = ()) -> Report:
    """The report over `runs`.

    Args:
        runs: the runs, in any state.
        skipped: lines about directories that could not be read.
        experiments: declared experiments; those without a run are listed as missing.
    """
    runs = list(runs)
    arms, left_out = group_arms(runs)
    arms = _in_declared_order(arms, experiments)
    qualifiers = _qualifiers(arms)
    compared = [_compared(arm, arms) for arm in arms]
    corrected = _corrected([comparison for comparison, _ in compared])
    best = _best(arms)
    rows = [
        _row(arm, arms, qualifiers, comparison, reason, best.get(arm.key))
        for arm, comparison, (_, reason) in zip(arms, corrected, compared, strict=True)
    ]
    known = {arm.experiment.id for arm in arms}
    rows += [_missing(experiment) for experiment in experiments if experiment.id not in known]
    scans, damaged = find_scans(arms, {arm.key: qualified(arm.experiment.id, qualifiers[arm.key]) for arm in arms})
    return Report(
        rows=tuple(rows),
        sources=find_sources(runs),
        skipped=(*skipped, *left_out, *damaged),
        tests=max((c.tests for c in corrected if c), default=0),
        updated=max((run.status.updated for run in runs), default=""),
        scans=scans,
    )


def baseline_arm(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm that `arm` declares as its baseline, under the same settings of the profile, whatever its directory.

    If several arms have the baseline's id, because its settings were changed between runs, it is the only one of them
    that `arm` can be compared with.

    Raises:
        ConfigError: if there is no such arm, or more than one.
    """
    candidates = [other for other in arms if other.experiment.id == arm.experiment.baseline]
    same = [other for other in candidates if _scale(other) == _scale(arm)]
    comparable = [other for other in same if _kind(arm, other) is not None]
    if len(comparable) > 1:
        places = ", ".join(str(other.runs[0].path.parent) for other in comparable)
        raise ConfigError(
            f"its baseline {arm.experiment.baseline} has runs of {len(comparable)} settings ({places}): give the "
            "report those that count, or use `roundoff compare`"
        )
    if same:
        return (comparable or same)[0]
    if candidates:
        raise ConfigError(f"{arm.experiment.baseline} ran under other profile settings than {arm.experiment.id}")
    raise ConfigError(f"its baseline {arm.experiment.baseline} is not among these runs")


def _kind(arm: Arm, other: Arm) -> Kind | None:
    """What the difference of two arms is due to; None if they cannot be compared."""
    try:
        return comparison_kind(arm, other)
    except ConfigError:
        return None


def _qualifiers(arms: Sequence[Arm]) -> dict[str, str]:
    """What tells each arm, by key, from others with the same id: nothing, its profile, or its profile and hash."""
    ids = Counter(arm.experiment.id for arm in arms)
    pairs = Counter((arm.experiment.id, arm.profile.name) for arm in arms)
    qualifiers = {}
    for arm in arms:
        is_alone = pairs[arm.experiment.id, arm.profile.name] == 1
        profile = arm.profile.name if is_alone else arm.key.removeprefix(f"{arm.experiment.id}/")
        qualifiers[arm.key] = profile if ids[arm.experiment.id] > 1 else ""
    return qualifiers


def _scale(arm: Arm) -> str:
    """The settings of the arm's profile that decide whether scores can be compared."""
    scale = arm.profile.model_dump(mode="json", exclude={"name", "title", "device"})
    scale["task"].pop("directory", None)
    return json.dumps(scale, sort_keys=True)


def _in_declared_order(arms: list[Arm], experiments: Sequence[Experiment]) -> list[Arm]:
    """Declared experiments in their order, then the others by family, each baseline before what is compared with it."""
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
    """The comparison of an arm with its declared baseline, or the reason why there is none."""
    if arm.experiment.baseline is None:
        return None, ""
    try:
        return compare_arms(arm, baseline_arm(arm, arms)), ""
    except ConfigError as error:
        return None, str(error)


def _corrected(comparisons: Sequence[Comparison | None]) -> list[Comparison | None]:
    """The comparisons with Holm's corrected p-values."""
    adjusted = stats.holm([c.deployed.p if c else None for c in comparisons])
    tests = sum(p is not None for p in adjusted)
    return [replace(c, p_holm=p, tests=tests) if c else None for c, p in zip(comparisons, adjusted, strict=True)]


def _best(arms: Sequence[Arm]) -> dict[str, int]:
    """Keys of the arms that beat every other arm of their family on the same chip and profile, Holm-corrected.

    Each has the number of collapsed runs in its comparisons, including its own.
    """
    best: dict[str, int] = {}
    for arm in arms:
        p_values, leads = [], True
        collapsed = len(arm.scores.collapsed) if arm.scores else 0
        for other in arms:
            if other is arm or not arm.scores or not other.scores or other.experiment.family != arm.experiment.family:
                continue
            if _scale(arm) != _scale(other) or _kind(arm, other) not in ("benefit", "training"):
                continue
            try:
                new, old = paired_scores(arm, other)
            except ConfigError:  # without a common seed, nothing shows which of the two is better
                leads = False
                break
            result = stats.paired_benefit(new.deployed, old.deployed)
            leads &= result.estimate > 0
            collapsed += len(old.collapsed)
            p_values.append(result.p)
        if leads and p_values and all(p is not None and p < ALPHA for p in stats.holm(p_values)):
            best[arm.key] = collapsed
    return best


def _row(
    arm: Arm,
    arms: Sequence[Arm],
    qualifiers: Mapping[str, str],
    comparison: Comparison | None,
    reason: str,
    best: int | None,
) -> Row:
    """The row of an arm.

    Args:
        arm: the arm.
        arms: all arms of the report.
        qualifiers: what tells the arms apart, by key.
        comparison: its comparison with the declared baseline, or None.
        reason: why there is no comparison.
        best: number of collapsed runs in the comparisons that make it the best, or None if it is not the best.
    """
    seeds = tuple(seed_row(run) for run in arm.runs)
    scores = arm.scores
    starts = [start for start in (start_scores(run)[0] for run in arm.final) if start is not None]
    diagnostics = {key: seed_curve(arm, key) for key in (*DIAGNOSTICS, *CORRECTIONS)}
    status, is_whole = arm_status(arm, arms)
    baseline = _baseline_or_none(arm, arms)
    return Row(
        id=arm.experiment.id,
        title=arm.experiment.title,
        family=arm.experiment.family,
        key=arm.key,
        qualifier=qualifiers[arm.key],
        baseline=arm.experiment.baseline,
        against=qualified(baseline.experiment.id, qualifiers[baseline.key])
        if baseline
        else arm.experiment.baseline or "",
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
        flips=find_flips(arm, baseline) if comparison and baseline else None,
        aqn=aqn_row(arm),
        published=published(arm.experiment.id, arm.experiment.baseline),
    )


def _baseline_or_none(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm that `arm` declares as its baseline, if there is exactly one that can be meant."""
    try:
        return baseline_arm(arm, arms) if arm.experiment.baseline is not None else None
    except ConfigError:
        return None


def _missing(experiment: Experiment) -> Row:
    """The row of a declared experiment without runs."""
    return Row(
        id=experiment.id,
        title=experiment.title,
        family=experiment.family,
        key=experiment.id,
        qualifier="",
        baseline=experiment.baseline,
        against=experiment.baseline or "",
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
