"""What `roundoff report` reports on: the runs below some directories, and declared experiments that have no run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roundoff.config import ConfigError, Experiment
from roundoff.experiments import families, load_experiment
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.runs.record import Run, find_runs


def report_of(roots: Sequence[Path]) -> Report:
    """The report on every run below `roots`.

    Raises:
        ConfigError: if there is none.
    """
    runs, skipped = find_runs(roots)
    if not runs:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ConfigError(f"there are no runs in {', '.join(map(str, roots))}: `roundoff run` makes them{reasons}")
    return build_report(runs, skipped, _declared_beside(runs))


def _declared_beside(runs: Sequence[Run]) -> list[Experiment]:
    """Every declared experiment of the runs' families; one without a run is reported as missing."""
    present = {run.experiment.family for run in runs}
    return [load_experiment(name) for family, ids in families().items() if family in present for name in ids]
