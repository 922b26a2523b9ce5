"""Outcomes and run directories drawn from a known model, for tests and benchmarks of statistics and reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roundoff import stats
from roundoff.config import Experiment, Profile
from roundoff.runs.directory import RunDirectory
from roundoff.runs.outcomes import Evaluation, Outcome
from roundoff.runs.record import Status

Array = NDArray[np.float64]


def solved(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


@dataclass(frozen=True)
class World:
    """The population from which arms, seeds and problems are drawn; its numbers are standard deviations in logits."""

    mean: float = 0.7
    problem: float = 2.0
    """How much problems differ in difficulty, in the same way for both arms."""
    problem_by_arm: float = 0.4
    """How much an arm suits some problems more than others, in the same way for all its seeds."""
    seed: float = 0.1
    """How much the seeds of one arm differ overall."""
    residual: float = 1.0
    """How much a seed suits some problems more than others."""

    def arm(self, rng: np.random.Generator, difficulty: Array, seeds: int, *, effect: float = 0.0) -> Array:
        """Outcomes `[seeds, problems]` of 0 and 1 of one arm on problems with these difficulties `[problems]`."""
        problems = len(difficulty)
        logits = (
            self.mean
            + effect
            + difficulty
            + self.problem_by_arm * rng.standard_normal(problems)
            + self.seed * rng.standard_normal((seeds, 1))
            + self.residual * rng.standard_normal((seeds, problems))
        )
        return (rng.random((seeds, problems)) < solved(logits)).astype(float)

    def difficulty(self, rng: np.random.Generator, problems: int) -> Array:
        return self.problem * rng.standard_normal(problems)

    def score(self, effect: float = 0.0) -> float:
        """Expected accuracy over the whole population (Gauss-Hermite quadrature, exact to about 1e-9)."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        spread = np.sqrt(self.problem**2 + self.problem_by_arm**2 + self.seed**2 + self.residual**2)
        return float((weights * solved(self.mean + effect + spread * nodes)).sum() / weights.sum())


WORLDS = {
    "typical": World(),
    "seeds differ much": World(seed=0.3),
    "seeds hardly differ": World(seed=0.03),
    "arms suit other problems": World(problem_by_arm=1.0, seed=0.05),
    "near the ceiling": World(mean=3.0, problem=1.0),
    "no seed effect at all": World(seed=0.0, problem_by_arm=0.0, residual=0.0),
}


@dataclass(frozen=True)
class CollapseRates:
    """How the collapse of some runs affects intervals, and how often it is detected (fractions)."""

    score_held: float
    """Share of arms whose interval contains the population's mean score, including collapsed runs."""
    score_held_said: float
    """Share of arms whose interval contains it or is marked as that of collapsed runs."""
    benefit_held: float
    """Share of comparisons whose interval contains the population's mean benefit."""
    benefit_held_said: float
    """Share of comparisons whose interval contains it or is marked as that of collapsed runs."""
    hits: float
    """Share of collapsed runs that are detected, in arms that also have a run that did not collapse."""
    false_alarms: float
    """Share of arms in which a run that did not collapse is taken for collapsed."""


def collapse_rates(
    world: World, seeds: int, *, repeats: int, problems: int, start: int, share: float = 0.15, fall: float = -4.0
) -> CollapseRates:
    """The rates if each run collapses with probability `share` to a score that is lower by `fall` logits."""
    rng, effect = np.random.default_rng(start), 0.4
    means = [(1 - share) * world.score(e) + share * world.score(e + fall) for e in (0.0, effect)]
    counts = dict.fromkeys(("score", "score_said", "benefit", "benefit_said", "hits", "collapsed", "false"), 0)
    for _ in range(repeats):
        difficulty = world.difficulty(rng, problems)
        before = float(world.arm(rng, difficulty, 1, effect=-0.5).mean())
        arms, said = [], 0
        for e in (0.0, effect):
            down = rng.random(seeds) < share
            healthy, bad = (world.arm(rng, difficulty, seeds, effect=x) for x in (e, e + fall))
            outcomes = np.where(down[:, None], bad, healthy)
            called = stats.collapsed_runs(outcomes.mean(axis=1), problems=problems, starts=[before] * seeds)
            clean = stats.collapsed_runs(healthy.mean(axis=1), problems=problems, starts=[before] * seeds)
            counts["false"] += bool(clean) or any(not down[i] for i in called)
            if seeds >= stats.MIN_SEEDS and not down.all():
                counts["collapsed"] += int(down.sum())
                counts["hits"] += sum(bool(down[i]) for i in called)
            said += len(called)
            arms.append((outcomes, len(called)))
        score = stats.score(arms[0][0], collapsed=arms[0][1])
        benefit = stats.paired_benefit(arms[1][0], arms[0][0], collapsed=said)
        for name, interval, truth in (("score", score, means[0]), ("benefit", benefit, means[1] - means[0])):
            held = interval.low <= truth <= interval.high
            counts[name] += held
            counts[f"{name}_said"] += held or interval.collapsed > 0
    return CollapseRates(
        *(counts[name] / repeats for name in ("score", "score_said", "benefit", "benefit_said")),
        hits=counts["hits"] / max(1, counts["collapsed"]),
        false_alarms=counts["false"] / (2 * repeats),
    )


def rates(world: World, seeds: int, *, repeats: int, problems: int, start: int) -> tuple[float, float, float]:
    """Rejection rate of a true null, coverage of a benefit, and coverage of a score."""
    rng = np.random.default_rng(start)
    effect, rejected, held, score_held = 0.4, 0, 0, 0
    true_benefit, true_score = world.score(effect) - world.score(), world.score()
    for _ in range(repeats):
        difficulty = world.difficulty(rng, problems)
        baseline, other = (world.arm(rng, difficulty, seeds) for _ in range(2))
        better = world.arm(rng, difficulty, seeds, effect=effect)
        rejected += stats.paired_benefit(other, baseline).excludes_zero
        benefit, score = stats.paired_benefit(better, baseline), stats.score(baseline)
        held += benefit.low <= true_benefit <= benefit.high
        score_held += score.low <= true_score <= score.high
    return rejected / repeats, held / repeats, score_held / repeats


PROVENANCE = {
    "command": "roundoff run simulated --seeds 0-2",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.11.7",
    "machine": {"system": "Linux", "processor": "a simulated processor"},
    "versions": {"roundoff": "0.1.0", "torch": "2.13.0"},
}


def profile(**training: int) -> Profile:
    sizes = {"prompts_per_step": 32, "learning_rate": 1e-4, "lora_learning_rate": 1e-3, "max_prompt_tokens": 16}
    lengths = {"max_new_tokens": 24, "evaluate_every": 10, "checkpoint_every": 10}
    return Profile.model_validate(
        {"name": "tiny", "model": "tiny", "task": {"name": "arithmetic"}, "training": sizes | lengths | training}
    )


def experiment(name: str, **settings: object) -> Experiment:
    return Experiment.model_validate({"id": name, "algorithm": {"name": "GRPO"}, **settings})


def evaluation(step: int, deployed: Array, clean: Array, *, text: str = "") -> Evaluation:
    """Outcomes `[problems]` of 0 and 1 as an evaluation of problems whose answers are their numbers."""
    outcomes = []
    for i, (on, off) in enumerate(zip(deployed, clean, strict=True)):
        shown = f"{i}>{i if on else i + 1}{text}"
        outcomes.append(
            Outcome(f"sum/{i:04}", f"{i}+0=", str(i), (int(on),), int(off), shown, f"{i if off else i + 1}")
        )
    return Evaluation(step, tuple(outcomes))


def write_run(
    root: Path,
    what: Experiment,
    seed: int,
    deployed: Array,
    clean: Array,
    *,
    state: str = "complete",
    steps: int = 40,
    reached: int | None = None,
    scale: Profile | None = None,
    text: str = "",
) -> Path:
    """A run directory whose last evaluation has these outcomes `[problems]`, and whose score rises from 60 % of it."""
    reached = steps if reached is None else reached
    last, last_clean = float(deployed.mean()), float(clean.mean())
    with RunDirectory(root, what, scale or profile(), seed) as run:
        run.start(PROVENANCE, steps)
        for step in range(reached + 1):
            done = 1 - np.exp(-3 * step / steps)
            row: dict[str, object] = {"step": step}
            if step:
                sigma = 0.05 * 0.01 ** ((step - 1) // 4 / 9) if what.aqn and step > 4 else 0.0
                ratio = {"ratio_std": 0.02 + 0.01 * np.sin(step + seed), "ratio_ess": 0.98, "kl": 0.001 * step}
                row |= {"reward": last * (0.6 + 0.4 * done), "sigma": sigma, "response_tokens": 5.0, **ratio}
            if step % 10 == 0 or step == steps:
                wobble = 0.01 * np.sin(3 * step + seed) if 0 < step < steps else 0.0
                shape = (0.6 + 0.4 * done) if step < steps else 1.0
                row |= {"deployed": last * shape + wobble, "clean": last_clean * shape + wobble}
            run.append_metrics(row)
        for step in {0, reached - reached % 10, reached} if state == "complete" else {0, reached - reached % 10}:
            run.write_evaluation(evaluation(step, deployed, clean, text=text))
        run.set_status(Status(state, reached, steps, "" if state == "complete" else "killed", 63.0))  # type: ignore[arg-type]
    return run.path


def quickstart(root: Path, *, seeds: int = 3, problems: int = 300, noise: float = -1.0, aqn: float = 0.6) -> None:
    """Four experiments: plain, MXFP4, matmul noise, which costs `noise` logits, and AQN, which regains `aqn`."""
    rng = np.random.default_rng(0)
    world = World()
    difficulty = world.difficulty(rng, problems)
    noisy = {"matmul_noise": {"relative_std": 0.1}}
    formats = {"precision": {"weight": "mxfp4", "activation": "mxfp4"}}
    schedule = {"sigma_start": 0.05, "sigma_end": 0.0005}
    arms: list[tuple[str, float, dict[str, object]]] = [
        ("plain", 0.0, {"title": "Plain arithmetic"}),
        ("mxfp4", -0.1, {"title": "MXFP4 weights and activations", "hardware": formats, "baseline": "plain"}),
        ("noise", noise, {"title": "10 % matmul noise", "hardware": noisy, "baseline": "plain"}),
        (
            "noise-aqn",
            noise + aqn,
            {"title": "10 % matmul noise, with AQN", "hardware": noisy, "baseline": "noise", "aqn": schedule},
        ),
    ]
    for name, effect, settings in arms:
        deployed = world.arm(rng, difficulty, seeds, effect=effect)
        clean = deployed if effect == 0.0 else world.arm(rng, difficulty, seeds, effect=effect / 2)
        for seed in range(seeds):
            write_run(root, experiment(name, family="simulated", **settings), seed, deployed[seed], clean[seed])
