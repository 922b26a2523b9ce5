"""One run to make, how it stands, and making it in this process."""

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
"""Message of a job that there was nothing to do for."""


Phase = Literal["queued", "running", "complete", "failed", "interrupted"]


@dataclass(frozen=True)
class RunRequest:
    """One run to make: settings, seed, and where it goes."""

    experiment: Experiment
    profile: Profile
    seed: int
    root: Path
    provenance: dict[str, Any]
    tracker: str = "tensorboard"
    """Names of trackers, with commas between them."""
    wandb: WandbSettings = field(default_factory=WandbSettings)

    @property
    def path(self) -> Path:
        """The run's directory."""
        return run_path(self.root, self.experiment, self.profile, self.seed)


@dataclass
class Job:
    """A request and what became of it so far."""

    request: RunRequest
    phase: Phase = "queued"
    message: str = ""
    """Why it failed or stopped, that it was complete before, or why a complete run is none that trained."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong in the run's process and was survived, as it is reported."""
    process: BaseProcess | None = None
    result: Connection | None = None
    began: float = 0.0
    seconds: float = 0.0
    resumed: bool = field(default=False)

    @property
    def is_untrained(self) -> bool:
        """Whether it reached its end without training anything."""
        return self.phase == "complete" and UNTRAINED in self.message


def execute(request: RunRequest, should_stop: Callable[[], bool], ranks: Ranks = ALONE) -> tuple[Phase, str]:
    """Make one run in this process, or in this and the others of `ranks`; returns how it ended and why."""
    from roundoff.launch.led_run import LedRunDirectory
    from roundoff.runs.directory import RunDirectory
    from roundoff.training.loop import train

    def tracker(resumed_from: int) -> Tracker:
        experiment, profile = request.experiment, request.profile
        tracked = TrackedRun(request.path, experiment, profile, request.seed, resumed_from, request.wandb)
        return open_trackers(request.tracker if ranks.leads else "none", tracked)

    held = RunDirectory(request.root, request.experiment, request.profile, request.seed)
    with held if ranks.count == 1 else LedRunDirectory(held, ranks) as run_dir:
        if ranks.first(lambda: job_of(request).phase == "complete"):  # by another process, before the lock was free
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
            return "interrupted", "stopped on request; the same command goes on"
        return "complete", run_dir.health().untrained


def check_distinct(requests: Sequence[RunRequest]) -> None:
    """Refuse two requests for one directory.

    Raises:
        ConfigError: naming the directory.
    """
    seen: set[Path] = set()
    for request in requests:
        if request.path in seen:
            raise ConfigError(f"two runs would share {request.path}: name each experiment and seed once")
        seen.add(request.path)


def job_of(request: RunRequest) -> Job:
    """The job of a request, as its directory stands: complete, damaged, or still to be made."""
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
    """Whether SIGINT or SIGTERM has come; a second SIGINT ends the process at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


POLL_S = 0.25
