"""The state of the runs of an arm, in data and in words."""

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
"""Words for the states of runs that have no score."""


@dataclass(frozen=True)
class SeedRow:
    """One run: its state and the scores of its last evaluation."""

    seed: int
    state: str
    """`complete`, `running`, `failed`, `interrupted`, or `unscored` (complete, but its last step was not evaluated)."""
    step: int
    total_steps: int
    reason: str
    """Why it ended, if it ended early; may be empty."""
    start: float | None
    """Deployed score before training (fraction)."""
    deployed: float | None
    """Deployed score at the last evaluation (fraction), which is final only if the state is `complete`."""
    clean: float | None
    """Clean score at the last evaluation (fraction)."""
    seconds: float
    """Time that the run has taken (s)."""
    path: str
    """Its directory."""
    warnings: tuple[str, ...] = ()
    """Problems in spite of which the run went on."""
    trained_steps: int | None = None
    """Number of steps that trained anything; None if the metrics do not say."""
    untrained: str = ""
    """Why a run that took steps trained nothing; empty if it trained."""
    failures: tuple[str, ...] = ()
    """The parts of its rollouts that were not computed, one sentence each."""

    @property
    def words(self) -> str:
        """Its state in words, with the step and the reason if it has no score."""
        if self.state == "complete":
            return f"complete, but {self.untrained}" if self.untrained else "complete"
        reason = f": {self.reason}" if self.reason else ""
        return f"{ENDED[self.state]} at step {self.step} of {self.total_steps}{reason}"


def seed_row(run: Run) -> SeedRow:
    """The state and the last scores of one run."""
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
    """What a reader must know about the score of an arm, one sentence each: the parts of it that were not computed."""
    scores = arm.scores
    sides = {} if scores is None else {"deployed": scores.flaws, "clean": scores.clean_flaws}
    notes = [f"{side}, last evaluation: {line}" for side, tally in sides.items() for line in tally.notes()]
    notes += [f"seed {row.seed}: {line}" for row in map(seed_row, arm.runs) for line in row.failures]
    return tuple(notes)


def arm_status(arm: Arm, arms: Sequence[Arm]) -> tuple[str, bool]:
    """The status of an arm in words, and whether it is whole, that is, complete, trained and scored for each seed that
    any arm of its family has under the same profile."""
    family = (arm.experiment.family, arm.profile.name)
    expected = {
        run.seed for other in arms if (other.experiment.family, other.profile.name) == family for run in other.runs
    }
    missing = sorted(expected - {run.seed for run in arm.runs})
    rows = [seed_row(run) for run in arm.runs]
    done = sum(row.state == "complete" and not row.untrained for row in rows)
    parts = [f"{done} complete"] if done else []
    parts += [f"seed {row.seed} {row.words}" for row in rows if row.words != "complete"]
    parts += [f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} missing"] if missing else []
    return "; ".join(parts), done == len(expected)
