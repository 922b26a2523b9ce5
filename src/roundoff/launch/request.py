"""One run to make, what has become of it, and how it is made in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from roundoff.config import ConfigError, Experiment, Profile
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.directory import run_path
from roundoff.runs.health import UNTRAINED
from roundoff.runs.outcomes import DamagedRunError
from roundoff.runs.record import read_run
from roundoff.trackers import TrackedRun, Tracker, WandbSettings, open_trackers

WAS_COMPLETE = "was complete"
"""Message of a job whose run was complete before, so that there was nothing to do."""


Phase = Literal["queued", "running", "complete", "failed", "interrupted"]


@dataclass(frozen=True)
class RunRequest:
    """One run to make: its settings, its seed, and where it is written."""

    experiment: Experiment
    profile: Profile
    seed: int
    root: Path
    """Directory that holds the run directories."""
    provenance: dict[str, Any]
    """Versions, machine and command, recorded with the run."""
    tracker: str = "tensorboard"
    """Names of trackers, with commas between them."""
    wandb: WandbSettings = field(default_factory=WandbSettings)

    @property
    def path(self) -> Path:
        """The run's directory."""
        return run_path(self.root, self.experiment, self.profile, self.seed)


@dataclass
class Job:
    """A request, and what has become of it so far."""

    request: RunRequest
    phase: Phase = "queued"
    message: str = ""
    """Why the run failed or stopped, that it was complete before, or why a complete run trained nothing."""
    warnings: list[str] = field(default_factory=list)
    """Problems that the run's process has reported and survived."""
    process: BaseProcess | None = None
    """The run's process on this machine while it runs; None for other ways of launching."""
    result: Connection | None = None
    """Connection on which that process sends warnings and how it ended."""
    began: float = 0.0
    """When the run began (monotonic s)."""
    seconds: float = 0.0
    """Time since then (s); for a run that was complete before, all the time it took."""
    resumed: bool = field(default=False)
    """Whether the run had taken steps before."""

    @property
    def is_untrained(self) -> bool:
        """Whether the run reached its end without training anything."""
        return self.phase == "complete" and UNTRAINED in self.message


def execute(request: RunRequest, should_stop: Callable[[], bool], ranks: Ranks = ALONE) -> tuple[Phase, str]:
    """Make one run in this process, or in this one and the others of `ranks`; returns its last phase and the reason.

    `should_stop` is asked after each step whether to save and stop.
    """
    from roundoff.launch.led_run import LedRunDirectory
    from roundoff.runs.directory import RunDirectory
    from roundoff.training.loop import train

    def tracker(resumed_from: int) -> Tracker:
        experiment, profile = request.experiment, request.profile
        tracked = TrackedRun(request.path, experiment, profile, request.seed, resumed_from, request.wandb)
        return open_trackers(request.tracker if ranks.leads else "none", tracked)

    held = RunDirectory(request.root, request.experiment, request.profile, request.seed)
    with held if ranks.count == 1 else LedRunDirectory(held, ranks) as run_dir:
        if ranks.first(lambda: job_of(request).phase == "complete"):  # by another process, while the lock was taken
            return "complete", ranks.first(lambda: job_of(request).message)
        final = train(
            request.experiment,
            request.profile,
            request.seed,
            run_dir,
            tracker,
            provenance=request.provenance if ranks.count == 1 else {**request.provenance, "ranks": ranks.count},
            should_stop=should_stop,
            ranks=ranks,
        )
        if final is None:
            return "interrupted", "stopped on request; the same command resumes it"
        return "complete", run_dir.health().untrained


def check_distinct(requests: Sequence[RunRequest]) -> None:
    """Refuse two requests that would write one directory.

    Raises:
        ConfigError: naming the directory.
    """
    seen: set[Path] = set()
    for request in requests:
        if request.path in seen:
            raise ConfigError(f"two runs would share {request.path}: name each experiment and seed once")
        seen.add(request.path)


def job_of(request: RunRequest) -> Job:
    """A new job for a request, in the phase that its directory is in: complete, damaged (failed), or queued."""
    if not (request.path / "status.json").exists():
        return Job(request)
    try:
        run = read_run(request.path)
    except DamagedRunError as error:
        return Job(request, "failed", f"damaged, move it away to start again: {error}")
    if run.is_final:
        message = "; ".join(filter(None, (WAS_COMPLETE, run.health.untrained)))
        return Job(request, "complete", message, seconds=run.status.seconds)
    return Job(request, resumed=run.status.step > 0)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM; yields a function that tells whether one has come.

    A second SIGINT ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


POLL_S = 0.25
"""Seconds between two looks at the runs of a grid."""
