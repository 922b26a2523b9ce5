"""What a run writes step by step: scores, metrics, checkpoints, and warnings of what was not computed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from roundoff.errors import RoundoffWarning
from roundoff.evaluation import evaluate
from roundoff.runs.clock import Clock
from roundoff.runs.directory import RunDirectory
from roundoff.runs.outcomes import Evaluation
from roundoff.runs.record import State, Status
from roundoff.trackers import Tracker, scalars
from roundoff.training.saving import save
from roundoff.training.session import Session

Metrics = dict[str, Any]


@dataclass
class RunLog:
    """Writes to the directory, the tracker and the status of a run in progress."""

    session: Session
    run_dir: RunDirectory
    tracker: Tracker
    status: Status
    clock: Clock
    _warned: set[str] = field(default_factory=set)

    def score(self, step: int) -> Evaluation:
        """Evaluate the model as it is after `step`, and write every outcome."""
        session, training = self.session, self.session.profile.training
        evaluation = evaluate(
            session.model,
            session.tokenizer,
            session.task,
            key=session.key,
            max_new_tokens=training.max_new_tokens,
            noise_draws=training.noise_draws,
            noisy=session.experiment.hardware.of("evaluation").is_noisy,
            step=step,
            ranks=session.ranks,
        )
        self.run_dir.write_evaluation(evaluation)
        return evaluation

    def record(self, step: int, metrics: Metrics) -> Evaluation | None:
        """Evaluate if an evaluation is due (always at step 0 and the last step), then log the step."""
        evaluation = None
        if step in (0, self.session.total_steps) or step % self.session.profile.training.evaluate_every == 0:
            began = time.perf_counter()
            evaluation = self.score(step)
            metrics |= evaluation.numbers()
            metrics["seconds_evaluate"] = time.perf_counter() - began
        metrics |= {"seconds": self.clock.lap(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._warn(step, metrics, evaluation)
        self.run_dir.append_metrics(metrics)
        self.tracker.log(step, scalars(metrics))
        return evaluation

    def save(self, step: int) -> None:
        """Save a checkpoint and the progress of the run."""
        save(self.session, self.run_dir, step)
        if step:
            self.end("running", step)

    def end(self, state: State, step: int, reason: str = "") -> None:
        """Write the state of the run after `step`."""
        self.run_dir.set_status(replace(self.status, state=state, step=step, reason=reason, seconds=self.clock.total()))

    def _warn(self, step: int, metrics: Metrics, evaluation: Evaluation | None) -> None:
        """Warn of what was not computed, once a session for each kind; the status keeps the warning."""
        for kind, text in _troubles(metrics, evaluation):
            if kind not in self._warned:
                self._warned.add(kind)
                line = f"step {step}: {text}"
                warnings.warn(line, RoundoffWarning, stacklevel=2)
                self.status = replace(self.status, warnings=tuple(dict.fromkeys((*self.status.warnings, line))))


def _troubles(metrics: Metrics, evaluation: Evaluation | None) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of everything that a step could not compute."""
    if evaluation is not None:
        where = f" (not finite first in {evaluation.nonfinite_at})" if evaluation.nonfinite_at else ""
        for line in evaluation.deployed_tally.notes():
            yield f"deployed {line[-10:]}", f"with the hardware on, {line}{where}"
        for line in evaluation.clean_tally.notes():
            yield f"clean {line[-10:]}", f"with the hardware off, {line}"
    if metrics.get("nonfinite"):
        yield "rollouts", f"{metrics['nonfinite']:,} rollouts were not computed: the logits were not finite"
    if metrics.get("reward_errors"):
        yield "rewards", f"the rewards of {metrics['reward_errors']:,} rollouts failed and count as 0"
    bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        yield (
            f"metrics {bad}",
            f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite (null in metrics.jsonl)",
        )
