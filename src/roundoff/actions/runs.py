"""What `roundoff runs` prints about a run."""

from __future__ import annotations

from roundoff.launch.progress import not_computed
from roundoff.runs.record import Run


def describe_run(run: Run) -> list[str]:
    """Where a run stands and its last scores, in one line, and a line for each of its warnings."""
    scored = [row for row in run.metrics if "deployed" in row]
    scores = ""
    if scored:
        last = scored[-1]
        scores = f"deployed {last['deployed']:.1%}{not_computed(last, 'deployed_')}  clean {last['clean']:.1%}"
    step = f"step {run.metrics[-1]['step'] if run.metrics else 0}/{run.status.total_steps}"
    title = f"  {run.experiment.title}" if run.experiment.title else ""
    state = f"{run.status.state}{' (not trained)' if run.is_final and run.health.untrained else ''}"
    line = f"{run.path}{title}  {state}  {step}  {scores}  {run.status.reason}".rstrip()
    warnings = dict.fromkeys((*run.status.warnings, *run.health.notes()))
    return [line, *(f"  warning: {warning}" for warning in warnings)]
