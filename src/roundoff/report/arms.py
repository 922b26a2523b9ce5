"""Groups runs into arms (same settings, several seeds) and reads the outcomes of their last evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from roundoff import stats
from roundoff.config import Experiment, Profile, result_hash
from roundoff.runs.health import Tally
from roundoff.runs.outcomes import Evaluation
from roundoff.runs.record import Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Outcomes of the last evaluation of several runs of one arm, with seeds and problems in ascending order."""

    seeds: tuple[int, ...]
    problems: tuple[str, ...]
    problem_set: str
    """Digest of every problem's id, prompt and answer; equal only for the same test set."""
    deployed: Float64[Array, "seeds problems"]
    """Share of noise draws in which each problem was solved with the hardware on."""
    clean: Float64[Array, "seeds problems"]
    """1 for each problem that was solved with the hardware off, else 0."""
    truncated: float
    """Share of first responses that were cut at the length limit (fraction)."""
    flaws: Tally
    """Flaws of the responses with the hardware on, over all runs and draws together."""
    clean_flaws: Tally
    """Flaws of the responses with the hardware off, over all runs together."""
    collapsed: tuple[int, ...] = ()
    """Seeds of the runs that collapsed, judged among all final runs of the arm and by their scores before training."""

    def of_seeds(self, seeds: Sequence[int]) -> Scores:
        """The outcomes of these seeds only, in this order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            deployed=self.deployed[rows],
            clean=self.clean[rows],
            collapsed=tuple(seed for seed in self.collapsed if seed in seeds),
        )


@dataclass(frozen=True)
class Arm:
    """All runs of one experiment under one profile; runs with other settings belong to another arm."""

    experiment: Experiment
    profile: Profile
    runs: tuple[Run, ...]
    """One run per seed, in ascending order of seeds."""

    @cached_property
    def final(self) -> tuple[Run, ...]:
        """The runs that reached and evaluated their last step, which alone are scored."""
        return tuple(run for run in self.runs if run.is_final)

    @property
    def key(self) -> str:
        """Unique name of the arm: experiment, profile and hash of the settings."""
        return f"{self.experiment.id}/{self.profile.name}-{result_hash(self.experiment, self.profile)}"

    @cached_property
    def scores(self) -> Scores | None:
        """Outcomes of the final runs, which are read only once; None if there are no final runs.

        Raises:
            DamagedRunError: if an evaluation cannot be read.
            ValueError: if the runs were scored on different problems or on a single one, or a problem appears twice.
        """
        return read_scores(self.final) if self.final else None


def group_arms(runs: Iterable[Run]) -> tuple[list[Arm], list[str]]:
    """The arms in order of first appearance, and a line for each run that is left out and why.

    A run is left out if it is a second copy of another, or if its evaluation cannot be used.
    """
    grouped: dict[tuple[str, str, str], dict[int, Run]] = {}
    left_out: list[str] = []
    for run in runs:
        key = (run.experiment.id, run.profile.name, result_hash(run.experiment, run.profile))
        seeds = grouped.setdefault(key, {})
        if run.seed in seeds:
            left_out.append(f"{run.path}: is a second copy of {seeds[run.seed].path}, which is used")
        else:
            seeds[run.seed] = run
    arms = []
    for seeds in grouped.values():
        members = [seeds[seed] for seed in sorted(seeds)]
        arm = Arm(members[0].experiment, members[0].profile, tuple(members))
        try:
            _ = arm.scores
        except ValueError:  # DamagedRunError is one
            arm, lines = _without_unreadable(arm)
            left_out += lines
        if arm.runs:
            arms.append(arm)
    return arms, left_out


def read_scores(runs: Sequence[Run]) -> Scores:
    """Outcomes of the last evaluation of each run, in the order of the runs.

    Raises:
        DamagedRunError: if an evaluation cannot be read.
        ValueError: if the runs were scored on different problems or on a single one, or a problem appears twice.
    """
    deployed, clean, cut = [], [], []
    flaws: list[str] = []
    clean_flaws: list[str] = []
    problems: tuple[str, ...] = ()
    digest = ""
    for run in runs:
        evaluation = run.evaluation(run.status.total_steps)
        outcomes = sorted(evaluation.outcomes, key=lambda o: o.id)
        ids, own_digest = tuple(o.id for o in outcomes), _digest(evaluation)
        if len(set(ids)) < len(ids):
            raise ValueError(f"{run.path}: a problem was scored twice in one evaluation")
        if len(ids) < 2:
            raise ValueError(f"{run.path}: was scored on a single problem, and an interval needs two")
        if digest and own_digest != digest:
            raise ValueError(f"{run.path}: was scored on other problems than {runs[0].path}")
        problems, digest = problems or ids, own_digest
        deployed.append([sum(o.deployed) / len(o.deployed) for o in outcomes])
        clean.append([float(o.clean) for o in outcomes])
        flaws += [flaw for outcome in outcomes for flaw in outcome.deployed_flaws()]
        clean_flaws += [outcome.clean_flaw for outcome in outcomes]
        cut.append(sum(o.truncated for o in outcomes) / len(outcomes))
    seeds, on = tuple(run.seed for run in runs), np.array(deployed)
    down = stats.collapsed_runs(on.mean(axis=1), problems=len(problems), starts=[start_scores(run)[0] for run in runs])
    return Scores(
        seeds=seeds,
        problems=problems,
        problem_set=digest,
        deployed=on,
        clean=np.array(clean),
        truncated=sum(cut) / len(cut),
        flaws=Tally.of(flaws),
        clean_flaws=Tally.of(clean_flaws),
        collapsed=tuple(seeds[i] for i in down),
    )


def start_scores(run: Run) -> tuple[float | None, float | None]:
    """Deployed and clean score before training (fractions); None if there was no evaluation then."""
    first = run.metrics[0] if run.metrics and run.metrics[0].get("step") == 0 else {}
    return first.get("deployed"), first.get("clean")


def _digest(evaluation: Evaluation) -> str:
    """A digest of the ids, prompts and answers of the problems."""
    lines = sorted(f"{o.id}\x1f{o.prompt}\x1f{o.answer}" for o in evaluation.outcomes)
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()


def _without_unreadable(arm: Arm) -> tuple[Arm, list[str]]:
    """The arm without the runs whose last evaluation cannot be used, and a line for each of these runs."""
    kept: list[Run] = []
    lines = []
    for run in arm.runs:
        scored = [other for other in kept if other.is_final]
        try:
            if run.is_final:
                read_scores([*scored[:1], run])
            kept.append(run)
        except ValueError as error:  # DamagedRunError is one
            lines.append(str(error))
    return Arm(arm.experiment, arm.profile, tuple(kept)), lines
