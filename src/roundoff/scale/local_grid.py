"""Many runs on this machine: each in a process of its own, as many at a time as there are cores.

A run that dies takes no other with it. Ctrl-C (or SIGTERM) lets every running run finish its step, save, and leave; the
same command then goes on where they stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from roundoff.config import ConfigError, Experiment, Profile
from roundoff.errors import message_of, warnings_as_text
from roundoff.health import UNTRAINED
from roundoff.parallel import ALONE, Ranks
from roundoff.run_dir import DamagedRunError, read_run, run_path
from roundoff.scale.readiness import note_obstacles, send_obstacles
from roundoff.trackers import TrackedRun, Tracker, WandbSettings, open_trackers

POLL_S = 0.25
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


def run_grid(
    requests: Sequence[RunRequest], *, workers: int, watch: Callable[[Sequence[Job]], None] = lambda jobs: None
) -> list[Job]:
    """Make every run that is not complete yet; returns all jobs in the order of the requests.

    Args:
        requests: runs to make; two must not share a directory.
        workers: processes at a time.
        watch: called a few times a second with the state of all jobs, and once at the end.

    Raises:
        ConfigError: before the first run begins, if no run that is to be made can begin.
    """
    check_distinct(requests)
    jobs = [job_of(request) for request in requests]
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    # Torch is imported once, by the server that every run's process is forked from (no effect on spawn).
    context.set_forkserver_preload(["roundoff.train"])
    passed_on = False
    with stop_requests() as stop:
        _check_ready([job for job in jobs if job.phase == "queued"], context, stop)
        while True:
            for job in jobs:
                _collect_result(job)
            running = [job for job in jobs if job.phase == "running"]
            queued = [] if stop() else [job for job in jobs if job.phase == "queued"]
            if stop() and not passed_on:
                passed_on = True  # a terminal's Ctrl-C reaches the runs by itself, a SIGTERM to this process does not
                for process in filter(None, (job.process for job in running)):
                    process.terminate()
            for job in queued[: workers - len(running)]:
                _start(job, context)
            watch(jobs)
            if not running and not queued:
                break
            time.sleep(POLL_S)
    for job in jobs:
        if job.phase == "queued":
            job.phase, job.message = "interrupted", "not begun"
    watch(jobs)
    return jobs


def execute(request: RunRequest, should_stop: Callable[[], bool], ranks: Ranks = ALONE) -> tuple[Phase, str]:
    """Make one run in this process, or in this and the others of `ranks`; returns how it ended and why."""
    from roundoff.run_dir import RunDirectory
    from roundoff.scale.led_run import LedRunDirectory
    from roundoff.train import train

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


def _check_ready(jobs: Sequence[Job], context: Any, stop: Callable[[], bool]) -> None:
    """Find what keeps runs from beginning in a process of its own, as they will be; one that dies has found nothing."""
    if not jobs:
        return
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_obstacles, args=([job.request for job in jobs], theirs))
    process.start()
    theirs.close()
    while not ours.poll(POLL_S) and not stop():
        pass
    with suppress(EOFError):
        if not stop():
            note_obstacles(jobs, ours.recv())
    process.terminate()
    process.join()
    ours.close()


def _start(job: Job, context: Any) -> None:
    job.result, theirs = context.Pipe(duplex=False)
    job.process = context.Process(target=_work, args=(job.request, theirs), name=str(job.request.path))
    job.process.start()
    theirs.close()
    job.phase, job.began = "running", time.monotonic()


def _work(request: RunRequest, result: Connection) -> None:
    """Body of a run's process: sends any number of `("warning", text)`, then how the run ended and why.

    A run whose parent was killed stops as if it had been asked to: the same command, given again, finds it free.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def send(kind: str, text: str) -> None:
        with suppress(BrokenPipeError):  # the parent is gone; the run's directory says how it ended
            result.send_bytes(json.dumps((kind, text)).encode())

    with stop_requests() as stop, warnings_as_text(lambda text: send("warning", text)):
        try:
            outcome = execute(request, lambda: stop() or not parent.is_alive())
        except Exception as error:  # whatever ends a run is reported by the parent beside the other runs
            outcome = ("failed", message_of(error))
        send(*outcome)


def _collect_result(job: Job) -> None:
    if job.phase != "running" or job.process is None or job.result is None:
        return
    job.seconds = time.monotonic() - job.began
    while job.result.poll():
        try:
            kind, text = json.loads(job.result.recv_bytes())
        except EOFError:
            job.process.join()
            kind, text = "failed", f"its process died (exit code {job.process.exitcode}); it can be resumed"
        if kind == "warning":
            job.warnings.append(text)
            continue
        job.phase, job.message = kind, text
        job.process.join()
        job.result.close()
        job.process.close()
        job.process = None
        return


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
