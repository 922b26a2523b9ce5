"""Where the runs of an arm stand, in data and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roundoff.report.arms import Arm, start_scores
from roundoff.runs.record import Run

ENDED = {
    "failed": "failed",
    "interrupted": "ended early",
    "running": "running",
    "unscored": "complete but not evaluated at its last step",
}
"""Words for the states that carry no score."""


@dataclass(frozen=True)
class SeedRow:
    """One run: where it stands and what its last evaluation gave."""

    seed: int
    state: str
    """complete | running | failed | interrupted | unscored (complete, but its last step was not evaluated)."""
    step: int
    total_steps: int
    reason: str
    start: float | None
    """Deployed score before training (fraction)."""
    deployed: float | None
    """Deployed score at the last evaluation (fraction): final only where the state is complete."""
    clean: float | None
    seconds: float
    path: str
    warnings: tuple[str, ...] = ()
    """What went wrong in the run and was survived."""
    trained_steps: int | None = None
    """Steps that trained anything; None where the metrics do not say."""
    untrained: str = ""
    """Why a run that took steps trained nothing; empty where it did."""
    failures: tuple[str, ...] = ()
    """What of its rollouts was not computed, a sentence each."""

    @property
    def words(self) -> str:
        """Its state in words, with the step and the reason where it has no score."""
        if self.state == "complete":
            return f"complete, but {self.untrained}" if self.untrained else "complete"
        reason = f": {self.reason}" if self.reason else ""
        return f"{ENDED[self.state]} at step {self.step} of {self.total_steps}{reason}"


def seed_row(run: Run) -> SeedRow:
    """State and last scores of one run."""
    scored = [row for row in run.metrics if row.get("deployed") is not None]
    last = scored[-1] if scored else {}
    complete = run.status.state == "complete"
    health = run.health
    return SeedRow(
        seed=run.seed,
        state="unscored" if complete and not run.is_final else run.status.state,
        step=run.status.step,
        total_steps=run.status.total_steps,
        reason=run.status.reason,
        start=start_scores(run)[0],
        deployed=last.get("deployed"),
        clean=last.get("clean"),
        seconds=run.status.seconds,
        path=str(run.path),
        warnings=tuple(run.status.warnings),
        trained_steps=health.trained if health.steps else None,
        untrained=health.untrained,
        failures=() if health.untrained else health.notes(),
    )


def arm_notes(arm: Arm) -> tuple[str, ...]:
    """What a reader must know beside the score of an arm, a sentence each: what of it was not computed."""
    scores = arm.scores
    sides = {} if scores is None else {"deployed": scores.flaws, "clean": scores.clean_flaws}
    said = [f"{side}, last evaluation: {line}" for side, tally in sides.items() for line in tally.notes()]
    said += [f"seed {row.seed}: {line}" for row in map(seed_row, arm.runs) for line in row.failures]
    return tuple(said)


def arm_status(arm: Arm, arms: Sequence[Arm]) -> tuple[str, bool]:
    """Status of an arm in words, and whether it is whole: each seed of its family is complete, trained and scored."""
    family = (arm.experiment.family, arm.profile.name)
    wanted = {
        run.seed for other in arms if (other.experiment.family, other.profile.name) == family for run in other.runs
    }
    missing = sorted(wanted - {run.seed for run in arm.runs})
    rows = [seed_row(run) for run in arm.runs]
    done = sum(row.state == "complete" and not row.untrained for row in rows)
    parts = [f"{done} complete"] if done else []
    parts += [f"seed {row.seed} {row.words}" for row in rows if row.words != "complete"]
    parts += [f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} missing"] if missing else []
    return "; ".join(parts), done == len(wanted)
