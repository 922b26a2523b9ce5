"""Many runs on a Ray cluster: each is a task with resources of its own, and gives the same bits as a local run.

A run whose worker or node dies is sent again, at most `retries` times, and resumes from its last checkpoint. Two
drivers may work on the same table: a run belongs to the process that holds the lock of its directory, and the other
driver waits until the lock is free. With a shared directory the task holds the lock. With `sync` the driver holds it,
and tasks write into directories of their own, whose changes come back through Ray's object store.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from roundoff.config import ConfigError
from roundoff.launch.ray.cluster import LOCAL, RayOptions, connected, missing_resource
from roundoff.launch.ray.sync import put, snapshot
from roundoff.launch.ray.worker import (
    Assignment,
    AttemptResult,
    Desk,
    Parcel,
    driver_versions,
    make_run,
    obstacles_on_node,
)
from roundoff.launch.readiness import note_obstacles
from roundoff.launch.request import POLL_S, Job, RunRequest, check_distinct, job_of, stop_requests
from roundoff.runs.directory import RunDirectory, RunLockedError

HELD_WAIT_S = 2.0
"""Seconds before the driver looks again at a run that another process holds."""


@dataclass
class SentJob:
    """What the driver knows about a job, besides its phase."""

    job: Job
    number: int
    """Index of the job, in the order of the requests."""
    attempt: int = 0
    """Number of the current attempt, from 1; 0 before the first."""
    reference: Any = None
    """Ray's reference to the attempt's result; None while no task is under way."""
    not_before: float = 0.0
    """When to look again at a run that another process holds (monotonic s)."""
    held: RunDirectory | None = None
    """The run's directory while the driver holds its lock, which it does with `sync`."""
    died: list[str] = field(default_factory=list)
    """Why each attempt ended that ended without a result."""
    parcels: int = 0
    """Parcels of this attempt whose files are in place."""
    cut_off: bool = False
    """Whether a parcel of this attempt was lost, so that later ones are useless."""

    def is_next(self, parcel: Parcel) -> bool:
        """Whether the parcel is the next in order; a gap cuts the attempt off, while a repeated parcel does not."""
        self.cut_off = self.cut_off or parcel.number > self.parcels
        return not self.cut_off and parcel.number == self.parcels


def run_on_ray(
    requests: Sequence[RunRequest],
    options: RayOptions,
    *,
    workers: int | None,
    watch: Callable[[Sequence[Job]], None] = lambda jobs: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """Make every run that is not complete yet on a cluster; returns all jobs in the order of the requests.

    Args:
        requests: runs to make; no two may share a directory.
        options: the cluster, and the resources that a run takes.
        workers: number of runs at a time; None: as many as fit.
        watch: called a few times a second with all jobs, and once at the end.
        warn: called with a text that the user should read while the runs go on.

    Raises:
        ConfigError: if no cluster answers, or a cluster that is started here cannot hold a run.
    """
    check_distinct(requests)
    requests = [replace(request, root=request.root.absolute()) for request in requests]
    cpus = options.cpus_per_run or float(max((r.profile.threads for r in requests), default=1))
    options = replace(options, cpus_per_run=cpus)
    with connected(options, workers or 1) as ray, stop_requests() as stop:
        missing = missing_resource(ray, cpus, options.gpus_per_run)
        if missing and options.address == LOCAL:
            raise ConfigError(f"no node of the cluster has {missing}")
        if missing:
            warn(f"no node of the cluster has {missing}: the runs wait until one joins")
        with _probes(requests, options) as probes:
            return _Grid(ray, options, workers, [job_of(r) for r in requests], probes).run(stop, watch)


@contextmanager
def _probes(requests: Sequence[RunRequest], options: RayOptions) -> Iterator[dict[Path, Path]]:
    """A held lock in each directory of runs, from which tasks see that they share it and that locks work there."""
    if options.sync:
        yield {}
        return
    probes = {root: root / f".probe-{uuid.uuid4().hex}" for root in {r.root for r in requests}}
    locks = [FileLock(probe) for probe in probes.values()]
    try:
        for root, lock in zip(probes, locks, strict=True):
            root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        yield probes
    finally:
        for lock, probe in zip(locks, probes.values(), strict=True):
            lock.release()
            probe.unlink(missing_ok=True)


class _Grid:
    """The driver's side of all jobs."""

    def __init__(
        self, ray: ModuleType, options: RayOptions, workers: int | None, jobs: list[Job], probes: dict[Path, Path]
    ) -> None:
        self._ray, self._options, self._jobs, self._probes = ray, options, jobs, probes
        self._limit = workers or len(jobs)
        self._sent = [SentJob(job, number) for number, job in enumerate(jobs)]
        self._versions = driver_versions()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self._desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here, **lasting).remote()
        self._task = ray.remote(make_run)
        self._resources = {"num_cpus": options.cpus_per_run, "num_gpus": options.gpus_per_run, "max_retries": 0}

    def run(self, stop: Callable[[], bool], watch: Callable[[Sequence[Job]], None]) -> list[Job]:
        """Make all runs; returns when every job has ended."""
        stopped = False
        try:
            self._check_ready(stop)
            while True:
                self._receive()
                if stop():
                    self._stop(take_back=not stopped)
                    stopped = True
                waiting = [] if stopped else [s for s in self._sent if s.job.phase == "queued" and not s.reference]
                flying = [s for s in self._sent if s.reference]
                for sent in [s for s in waiting if s.not_before <= time.monotonic()][: self._limit - len(flying)]:
                    self._send(sent)
                watch(self._jobs)
                flying = [s for s in self._sent if s.reference]
                if not flying and not waiting:
                    break
                if flying:
                    self._ray.wait([s.reference for s in flying], timeout=POLL_S)
                else:
                    time.sleep(POLL_S)
        finally:
            for sent in self._sent:
                self._let_go(sent)
        for job in self._jobs:
            if job.phase == "queued":
                job.phase, job.message = "interrupted", "not begun"
        watch(self._jobs)
        return self._jobs

    def _check_ready(self, stop: Callable[[], bool]) -> None:
        """Find on a node what keeps runs from beginning; if the check itself cannot be made, nothing was found.

        Raises:
            ConfigError: if no run that is to be made can begin.
        """
        jobs = [job for job in self._jobs if job.phase == "queued"]
        if not jobs:
            return
        check = self._ray.remote(obstacles_on_node).options(name="check of the settings", **self._resources)
        reference = check.remote([job.request for job in jobs], str(Path.cwd()))
        while not self._ray.wait([reference], timeout=POLL_S)[0]:
            if stop():
                self._ray.cancel(reference)
                return
        try:
            reasons = self._ray.get(reference)
        except self._ray.exceptions.RayError:
            return
        note_obstacles(jobs, reasons)

    def _send(self, sent: SentJob) -> None:
        """Give a job to Ray, unless its run has ended meanwhile or another driver holds it."""
        request = sent.job.request
        if self._options.sync:
            directory = RunDirectory(request.root, request.experiment, request.profile, request.seed)
            try:
                sent.held = directory.__enter__()
            except RunLockedError:
                self._wait_for_holder(sent)
                return
        now = job_of(request)
        if now.phase != "queued":
            sent.job.phase, sent.job.message, sent.job.seconds = now.phase, now.message, now.seconds
            self._let_go(sent)
            return
        sent.job.resumed = now.resumed
        sent.attempt += 1
        assignment = Assignment(
            request,
            sent.number,
            sent.attempt,
            str(Path.cwd()),
            self._versions,
            self._probes.get(request.root),
        )
        before = snapshot(request.path) if self._options.sync else None
        name = f"{request.experiment.id} seed {request.seed}"
        sent.reference = self._task.options(name=name, **self._resources).remote(assignment, self._desk, before)

    def _receive(self) -> None:
        """Note which jobs have begun, put received files in place, and record which jobs have ended."""
        flying = [s.reference for s in self._sent if s.reference is not None]
        ended = set(self._ray.wait(flying, num_returns=len(flying), timeout=0)[0]) if flying else set()
        began, mail = self._ray.get(self._desk.collect.remote())  # after the wait: it has all that ended tasks sent
        for number, attempt, parcel in mail:  # those of one attempt are in order
            self._unpack(self._sent[number], attempt, parcel)
        for sent in self._sent:
            if sent.reference is None:
                continue
            attempt, _ = began.get(sent.number, (0, ""))
            if sent.job.phase == "queued" and attempt == sent.attempt:
                sent.job.phase, sent.job.message, sent.job.began = "running", "", time.monotonic()
            if sent.job.phase == "running":
                sent.job.seconds = time.monotonic() - sent.job.began
            if sent.reference in ended:
                self._end(sent)

    def _unpack(self, sent: SentJob, attempt: int, parcel: Parcel) -> None:
        if sent.reference is None or attempt != sent.attempt or not sent.is_next(parcel):
            return  # the attempt was given up, or has lost a parcel
        for reference in parcel.update:
            try:
                put(self._ray.get(reference, timeout=60), sent.job.request.path)
            except self._ray.exceptions.RayError:  # it died with its node; the next attempt starts before this change
                sent.cut_off = True
                return
        sent.parcels += 1

    def _end(self, sent: SentJob) -> None:
        """Record the result of an attempt that has ended."""
        errors = self._ray.exceptions
        try:
            result: AttemptResult = self._ray.get(sent.reference)
        except errors.TaskCancelledError:
            result = AttemptResult("interrupted", "not begun")
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:  # raised on the way to the run, not by it
            result = AttemptResult("failed", str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            result = self._died(sent, type(error).__name__)
        if result.update is not None and (sent.cut_off or result.parcels != sent.parcels):
            result = self._died(sent, "its files were lost on the way")
        sent.reference, sent.cut_off, sent.parcels = None, False, 0
        sent.job.warnings += result.warnings
        if result.update is not None:
            put(result.update, sent.job.request.path)
        self._let_go(sent)
        if result.phase == "held":
            self._wait_for_holder(sent)
        else:
            sent.job.phase, sent.job.message = result.phase, result.message

    def _died(self, sent: SentJob, reason: str) -> AttemptResult:
        """Note that the worker or its node died; the result queues the job again as long as retries are left."""
        sent.died.append(reason)
        text = f"its worker died ({', '.join(sent.died)})"
        if len(sent.died) <= self._options.retries:
            return AttemptResult("queued", f"{text}; sent again")
        return AttemptResult("failed", f"{text}; it can be resumed")

    def _wait_for_holder(self, sent: SentJob) -> None:
        sent.job.phase, sent.job.message = "queued", "held by another process; waits"
        sent.not_before = time.monotonic() + HELD_WAIT_S

    def _stop(self, take_back: bool) -> None:
        """Ask running tasks to finish their step and save; with `take_back`, cancel those that have not begun."""
        for sent in self._sent if take_back else ():
            if sent.reference and sent.job.phase == "queued":
                self._ray.cancel(sent.reference)
        self._ray.get(self._desk.stop.remote())  # each time, because a desk that was restarted has forgotten it

    def _let_go(self, sent: SentJob) -> None:
        if sent.held is not None:
            sent.held.__exit__()
            sent.held = None
