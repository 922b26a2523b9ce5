"""The live display of `roundoff run`. It reads the run directories, so it shows what is on disk and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from roundoff.launch.request import WAS_COMPLETE, Job
from roundoff.runs.outcomes import DamagedRunError
from roundoff.runs.record import read_metrics, read_run, read_status

REFRESH_S = 0.5
"""Seconds between two drawings of the table on a terminal."""
EVENTS_S = 2.0
"""Seconds between two looks for events elsewhere: each look reads the metrics of every running run."""
RECENT_STEPS = 8
"""Steps whose mean time the estimate of the time left rests on."""
STYLES = {"queued": "dim", "running": "bold", "complete": "green", "failed": "red", "interrupted": "yellow"}


class Progress:
    """Draws jobs as a live table on a terminal, and prints one line for each event elsewhere."""

    def __init__(self, console: Console, workers: int) -> None:
        self._console, self._workers = console, workers
        self._live: Live | None = None
        self._drawn = 0.0
        self._printed: dict[str, tuple[str, int]] = {}  # last phase and step of each run, where events are printed
        self._warned: dict[str, int] = {}  # number of warnings printed, by run
        self._opened = datetime.now(UTC).isoformat(timespec="seconds")
        self._ended: dict[Path, list[dict[str, Any]]] = {}

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Keep the display open inside the block."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, auto_refresh=False) as self._live:
            yield self

    def update(self, jobs: Sequence[Job]) -> None:
        """Draw the jobs as they are now; called every fraction of a second, it draws less often than that."""
        for job in jobs:
            self._warn(job)
        finished = all(job.phase not in ("queued", "running") for job in jobs)
        if time.monotonic() - self._drawn < (REFRESH_S if self._live else EVENTS_S) and not finished:
            return
        self._drawn = time.monotonic()
        rows = [(job, self._metrics(job)) for job in jobs]
        if self._live:
            self._live.update(self._table(rows), refresh=True)
        else:
            for job, metrics in rows:
                self._print_events(job, metrics)

    def _warn(self, job: Job) -> None:
        """Print the job's new warnings; on a terminal they scroll above the table."""
        name = f"{_experiment(job)} seed {job.request.seed}"
        for text in job.warnings[self._warned.get(name, 0) :]:
            self._line(f"{name}: warning: {text}")
        self._warned[name] = len(job.warnings)

    def _metrics(self, job: Job) -> list[dict[str, Any]]:
        """Metrics on disk; those of a run that has ended no longer change, so they are read once."""
        path = job.request.path
        if path in self._ended:
            return self._ended[path]
        metrics = _metrics(job)
        if job.phase not in ("queued", "running"):
            self._ended[path] = metrics
        return metrics

    def _table(self, rows: Sequence[tuple[Job, list[dict[str, Any]]]]) -> Table:
        table = Table(title=_headline([job for job, _ in rows], rows, self._workers), title_justify="left", box=None)
        for name in ("experiment", "seed", "state", "", "step", "reward", "deployed", "clean", "sigma", "left"):
            table.add_column(name, justify="left" if name in ("experiment", "state", "") else "right", no_wrap=True)
        table.add_column("", style="red", no_wrap=True)
        for job, metrics in rows:
            last, total = metrics[-1] if metrics else {}, total_steps(job)
            table.add_row(
                _experiment(job),
                str(job.request.seed),
                Text("not trained", style="red") if job.is_untrained else Text(job.phase, style=STYLES[job.phase]),
                ProgressBar(total or 1, last.get("step", 0), width=16),
                f"{last.get('step', 0)}/{total}" if total else "",
                _shown(last.get("reward"), "{:.3f}"),
                _shown(_latest(metrics, "deployed"), "{:.1%}"),
                _shown(_latest(metrics, "clean"), "{:.1%}"),
                _shown(last.get("sigma") or None, "{:.4f}"),
                _time(seconds_left(job, metrics)) if job.phase == "running" else _first_line(job.message),
                _failures(metrics),
            )
        return table

    def _print_events(self, job: Job, metrics: list[dict[str, Any]]) -> None:
        name = f"{_experiment(job)} seed {job.request.seed}"
        phase, step = self._printed.get(name, ("queued", -1))
        if job.phase != phase and job.phase == "running":
            self._line(f"{name}: {self._beginning(job, metrics)}")
        if metrics and metrics[-1]["step"] < step:
            step = -1  # the run went back to a checkpoint, and takes later steps again
        for row in metrics if job.phase != "complete" or phase != "queued" else []:
            if row["step"] > step and "deployed" in row and row.get("time", self._opened) >= self._opened:
                left = _time(seconds_left(job, metrics)) if job.phase == "running" else ""
                self._line(
                    f"{name}: step {row['step']}/{total_steps(job)}"
                    f" deployed {row['deployed']:.1%}{not_computed(row, 'deployed_')} clean {row['clean']:.1%}"
                    + (f" reward {row['reward']:.3f} sigma {row['sigma']:.4f}" if "reward" in row else "")
                    + (f" left {left}" if left else "")
                )
        if job.phase != phase and job.phase not in ("queued", "running"):
            self._line(f"{name}: {job.phase}" + (f" ({job.message})" if job.message else ""))
        self._printed[name] = (job.phase, metrics[-1]["step"] if metrics else -1)

    def _beginning(self, job: Job, metrics: list[dict[str, Any]]) -> str:
        """Whether a run is new, continues the run that it extends, or was stopped before."""
        if not job.resumed:
            return "started"
        before = max((row["step"] for row in metrics if row.get("time", self._opened) < self._opened), default=0)
        extended_from = _extended_from(job)
        return "resumed" if extended_from is None or before > extended_from else f"extended from step {extended_from}"

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _experiment(job: Job) -> str:
    """Id of the experiment, with the settings of the profile that were changed on the command line."""
    _, changed, settings = job.request.profile.name.partition("+")
    return job.request.experiment.id + (f" ({settings})" if changed else "")


def _extended_from(job: Job) -> int | None:
    """Last step of the run that this one extends; None if it extends none."""
    try:
        parent = read_run(job.request.path).provenance.get("parent")
    except DamagedRunError:
        return None
    return int(parent["step"]) if parent else None


def total_steps(job: Job) -> int:
    """Steps of the whole run; 0 while the run has written no status."""
    try:
        return read_status(job.request.path).total_steps
    except DamagedRunError:
        return 0


def seconds_left(job: Job, metrics: Sequence[dict[str, Any]]) -> float | None:
    """Time left (s), estimated from the latest steps; None before the first step."""
    steps = [row["seconds"] for row in metrics if row["step"] > 0][-RECENT_STEPS:]
    if not steps:
        return None
    return float(sum(steps) / len(steps) * (total_steps(job) - metrics[-1]["step"]))


def _headline(jobs: Sequence[Job], rows: Sequence[tuple[Job, list[dict[str, Any]]]], workers: int) -> str:
    counts = {phase: sum(job.phase == phase for job in jobs) for phase in STYLES}
    text = ", ".join(f"{count} {phase}" for phase, count in counts.items() if count)
    running = [seconds_left(job, metrics) for job, metrics in rows if job.phase == "running"]
    known = [s for s in running if s is not None]
    completed = [job.seconds for job in jobs if job.phase == "complete" and not job.message.startswith(WAS_COMPLETE)]
    each = sum(completed) / len(completed) if completed else None
    if counts["queued"] and each is None:
        return text
    left = (sum(known) + counts["queued"] * (each or 0.0)) / max(1, min(workers, counts["running"] + counts["queued"]))
    return f"{text}, about {_time(left)} left" if known else text


def not_computed(row: dict[str, Any], prefix: str) -> str:
    """Shares of responses that could not be computed or rewarded, in brackets; empty if there are none.

    `row` is the row of an evaluated step, in which the names of the score in question begin with `prefix`.
    """
    words = {"nonfinite": "not finite", "reward_error": "reward failed"}
    shares = ((text, row.get(f"{prefix}{name}")) for name, text in words.items())
    parts = [f"{share:.1%} {text}" for text, share in shares if share]
    return f" ({', '.join(parts)})" if parts else ""


def _failures(metrics: Sequence[dict[str, Any]]) -> str:
    """What could not be computed in the last step and the last evaluation, in a few words."""
    last = metrics[-1] if metrics else {}
    words = {"nonfinite": "rollouts not finite", "reward_errors": "rewards failed"}
    parts = [f"{last[name]:,} {text}" for name, text in words.items() if last.get(name)]
    scored = [row for row in metrics if "deployed" in row][-1:]
    parts += [f"deployed{text}" for row in scored if (text := not_computed(row, "deployed_"))]
    return ", ".join(parts)


def _metrics(job: Job) -> list[dict[str, Any]]:
    try:
        return read_metrics(job.request.path)
    except DamagedRunError:
        return []


def _latest(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(metrics) if name in row), None)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds))).removeprefix("0:")


def _first_line(text: str) -> str:
    return text.splitlines()[0][:60] if text else ""
