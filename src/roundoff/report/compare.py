"""Compares two arms by seed and problem: the benefit of a remedy, the effect of training on other arithmetic, or the
cost of hardware. It refuses other pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from roundoff import stats
from roundoff.config import NAMES_ONLY, ConfigError, flatten
from roundoff.report.arms import Arm, Scores, group_arms, start_scores
from roundoff.report.chips import same_chip, same_deployment
from roundoff.runs.record import Run

Kind = Literal["benefit", "training", "cost"]
Outcome = Literal["shown", "hint", "not shown", "not testable"]
ALPHA = 0.05
"""Level of the tests, and p below which a difference is shown."""
VERDICTS: Mapping[Kind, tuple[str, str, str]] = {
    "benefit": ("helps", "hurts", "no benefit shown"),
    "training": ("trains better", "trains worse", "no difference shown"),
    "cost": ("gains accuracy", "costs accuracy", "no cost shown"),
}
"""What is said of a kind if the difference is shown and positive, shown and negative, or not shown."""
COUNTS = {0: "no", 1: "one", 2: "two"}
"""Numbers of runs that are too few for a test, in words."""


@dataclass(frozen=True)
class Comparison:
    """Difference of a treatment to its baseline, in fractions of the test set; positive is better."""

    treatment: str
    """Id of the treatment's experiment."""
    baseline: str
    """Id of the baseline's experiment."""
    kind: Kind
    """`benefit`: both ran on the same hardware, so the difference is due to the remedy. `training`: both are deployed
    on the same hardware, but were trained on different arithmetic, to which the difference is due. `cost`: the baseline
    ran on plain arithmetic, so the difference is due to the hardware."""
    seeds: tuple[int, ...]
    """Seeds over which the comparison is paired; for two single runs, the treatment's seed."""
    problems: int
    """Number of test problems."""
    deployed: stats.Interval
    """Difference of deployed scores: the headline."""
    clean: stats.Interval
    """Difference of clean scores."""
    flips: tuple[stats.McNemar, ...]
    """Problems gained and lost for each seed, with the exact McNemar test, which concerns that one pair of runs."""
    differs: tuple[str, ...] = ()
    """Paths of the settings in which the two differ."""
    baseline_seeds: tuple[int, ...] = ()
    """Seeds of the baseline; they differ from `seeds` only if each arm has a single run."""
    unpaired: int = 0
    """Number of complete runs of either arm that have no partner of the same seed, so that they do not count."""
    start: float | None = None
    """Difference of deployed scores before training (fraction), which is the effect of the hardware on the untrained
    model; None if a run was not evaluated then."""
    p_holm: float | None = None
    """p-value of the deployed difference, corrected over its report; None outside a report or if not testable."""
    tests: int = 1
    """Number of tests in that report."""

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero and the corrected p-value is below 5 %."""
        p = self.deployed.p if self.p_holm is None else self.p_holm
        return self.deployed.excludes_zero and p is not None and p < ALPHA

    @property
    def outcome(self) -> Outcome:
        """Class of the conclusion. A hint is a class of its own: the effect is not shown, but there is a sign of it."""
        if len(self.seeds) < stats.MIN_SEEDS:
            return "not testable"
        return "shown" if self.is_shown else "hint" if self.deployed.excludes_zero else "not shown"

    @property
    def verdict(self) -> str:
        """The conclusion in a few words, with the number of collapsed runs if there are any."""
        count = self.deployed.collapsed
        return self._verdict + (f" ({count} run{'s' if count > 1 else ''} collapsed)" if count else "")

    @property
    def _verdict(self) -> str:
        if len(self.seeds) < stats.MIN_SEEDS:
            return f"{COUNTS[len(self.seeds)]} run{'s' if len(self.seeds) > 1 else ''}: not testable"
        better = self.deployed.estimate > 0
        helps, hurts, neither = VERDICTS[self.kind]
        if self.is_shown:
            return helps if better else hurts
        if self.outcome == "hint":
            return f"hint only: not significant among {self.tests} tests"
        return neither


def compare(treatment: Sequence[Run], baseline: Sequence[Run]) -> Comparison:
    """The paired comparison of two arms, each given by its runs.

    Raises:
        ConfigError: if an arm mixes settings or has no complete run, if no seed is complete in both, if they were
        scored
            on different problems, or if their hardware differs and the baseline's is not plain arithmetic.
    """
    return compare_arms(_one_arm(treatment, "treatment"), _one_arm(baseline, "baseline"))


def compare_arms(treatment: Arm, baseline: Arm) -> Comparison:
    """The paired comparison of two arms; it raises the same errors as `compare`."""
    kind = comparison_kind(treatment, baseline)
    new, old = paired_scores(treatment, baseline)
    collapsed = len(new.collapsed) + len(old.collapsed)
    return Comparison(
        treatment=treatment.experiment.id,
        baseline=baseline.experiment.id,
        kind=kind,
        seeds=new.seeds,
        problems=len(new.problems),
        deployed=stats.paired_benefit(new.deployed, old.deployed, collapsed=collapsed),
        clean=stats.paired_benefit(new.clean, old.clean, collapsed=collapsed),
        flips=tuple(stats.mcnemar(a, b) for a, b in zip(new.deployed, old.deployed, strict=True)),
        differs=_differing(treatment, baseline),
        baseline_seeds=old.seeds,
        unpaired=len(treatment.final) + len(baseline.final) - len(new.seeds) - len(old.seeds),
        start=_start_difference((treatment, new.seeds), (baseline, old.seeds)),
    )


def comparison_kind(treatment: Arm, baseline: Arm) -> Kind:
    """Whether the difference of two arms is a benefit, due to the arithmetic of training, or a cost.

    Raises:
        ConfigError: if it is none of these, because the models differ, or because they are deployed on different
        hardware and the baseline's is not plain arithmetic.
    """
    if treatment.profile.model != baseline.profile.model:
        raise ConfigError(
            f"{treatment.experiment.id} trained {treatment.profile.model} and {baseline.experiment.id} trained "
            f"{baseline.profile.model}: only arms that start from the same model are compared"
        )
    new, old = treatment.experiment.hardware, baseline.experiment.hardware
    if same_chip(new, old):
        return "benefit"
    if old.changes_nothing:
        return "cost"
    if same_deployment(new, old):
        return "training"
    names = treatment.experiment.id, baseline.experiment.id
    swapped = " (the other way round it would be a cost)" if new.changes_nothing else ""
    raise ConfigError(
        f"{names[0]} and {names[1]} are deployed on different hardware, so their difference is neither a benefit nor a "
        f"cost{swapped}: compare arms on the same hardware, or take a baseline on plain arithmetic"
    )


def paired_scores(treatment: Arm, baseline: Arm) -> tuple[Scores, Scores]:
    """Outcomes of both arms over the seeds that are complete in both.

    If each arm has a single complete run, the two are paired by problem alone, whatever their seeds.

    Raises:
        ConfigError: if there is no such seed, the problems differ, or a complete run did not train anything.
    """
    names = treatment.experiment.id, baseline.experiment.id
    new, old = treatment.scores, baseline.scores
    for name, scores in zip(names, (new, old), strict=True):
        if scores is None:
            raise ConfigError(f"{name} has no complete run, and only complete runs are compared: `roundoff run {name}`")
    assert new is not None and old is not None
    if new.problem_set != old.problem_set:
        common = len(set(new.problems) & set(old.problems))
        raise ConfigError(
            f"{names[0]} and {names[1]} were scored on different problems ({len(new.problems)} and "
            f"{len(old.problems)}, {common} ids in common): run both with the same task settings"
        )
    _check_trained(treatment)
    _check_trained(baseline)
    if len(new.seeds) == len(old.seeds) == 1:
        return new, old
    seeds = sorted(set(new.seeds) & set(old.seeds))
    if not seeds:
        raise ConfigError(
            f"{names[0]} and {names[1]} have no complete seed in common ({_listed(new.seeds)} and "
            f"{_listed(old.seeds)}), and arms are paired by seed: run both with the same --seeds"
        )
    return new.of_seeds(seeds), old.of_seeds(seeds)


def _check_trained(arm: Arm) -> None:
    """Refuse an arm with a complete run that trained nothing, because its score is not a result of training.

    Leaving out such a seed would be worse than refusing the arm: only the lucky seeds would count.

    Raises:
        ConfigError: if there is such a run.
    """
    for run in arm.final:
        if reason := run.health.untrained:
            raise ConfigError(
                f"{arm.experiment.id} seed {run.seed} is complete, but {reason}; its score is that of an untrained "
                "model, and no difference to it says what training on this hardware gives"
            )


def _differing(treatment: Arm, baseline: Arm) -> tuple[str, ...]:
    """Paths of the settings that differ and change results, in alphabetical order."""

    def settings(arm: Arm) -> dict[str, object]:
        experiment = arm.experiment.model_dump(mode="json", exclude=NAMES_ONLY["experiment"])
        profile = arm.profile.model_dump(mode="json", exclude=NAMES_ONLY["profile"] | {"device"})
        profile["task"].pop("directory", None)
        for name in ("aqn", "srdd", "lora"):  # a table that only one arm has counts as one setting
            if None in (getattr(treatment.experiment, name), getattr(baseline.experiment, name)):
                experiment[name] = str(experiment[name])
        return flatten(experiment | {"profile": profile})

    new, old = settings(treatment), settings(baseline)
    return tuple(sorted(path for path in new.keys() | old.keys() if new.get(path) != old.get(path)))


def _one_arm(runs: Sequence[Run], name: str) -> Arm:
    """The only arm of these runs; `name` says in messages which side of the comparison it is."""
    arms, left_out = group_arms(runs)
    if len(arms) != 1:
        keys = ", ".join(arm.key for arm in arms) or "no run that can be read"
        raise ConfigError(f"{name} must be runs of one experiment under one profile, but is {keys}")
    if left_out:
        raise ConfigError(f"{name} cannot be used as given:\n" + "\n".join(left_out))
    return arms[0]


def _start_difference(*sides: tuple[Arm, Sequence[int]]) -> float | None:
    """Difference of the two arms' mean deployed scores before training, each over its seeds; None if one is missing."""
    starts = []
    for arm, seeds in sides:
        scores = [start_scores(run)[0] for run in arm.final if run.seed in seeds]
        if any(score is None for score in scores):
            return None
        starts.append(sum(score for score in scores if score is not None) / len(scores))
    return starts[0] - starts[1]


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
