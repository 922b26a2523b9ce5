"""Runs under torchrun: every rank goes through the same runs, one after the other; the first rank writes.

    torchrun --nproc-per-node 2 -m roundoff run quickstart-clean

A run can be stopped on one number of ranks and go on on another. What torchrun sends to all ranks when it is told to
stop (SIGTERM) ends every rank after the same step; it kills those that need more than 30 seconds for that, and then the
run goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence

from roundoff.config import ConfigError, result_hash
from roundoff.errors import RoundoffError, message_of, warnings_as_text
from roundoff.launch.request import Job, Phase, RunRequest, check_distinct, execute, job_of, stop_requests
from roundoff.parallel.ranks import Ranks, joined
from roundoff.runs.provenance import PACKAGES, package_version


def run_in_ranks(
    requests: Sequence[RunRequest], watch: Callable[[Sequence[Job]], None] = lambda jobs: None
) -> tuple[list[Job], bool]:
    """Make every run that is not complete yet, one after the other; all jobs, and whether this is the first rank.

    `watch` is called on the first rank alone, after every step. The first run that fails ends the launch: ranks that
    have parted cannot be brought together again.

    Raises:
        ConfigError: if the ranks do not agree on what to make and with which versions, or their devices do not fit.
    """
    from roundoff.models.device import resolve_device

    check_distinct(requests)
    jobs = [Job(request) for request in requests]
    with joined(resolve_device(requests[0].profile.device)) as ranks, stop_requests() as stop:
        _check_agreement(requests, ranks)
        for job in jobs:
            if ranks.any(stop()):
                job.phase, job.message = "interrupted", "not begun"
                continue
            job.phase, job.message, job.resumed = ranks.first(lambda job=job: _state(job.request))  # type: ignore[misc]
            if job.phase == "queued":
                _run(job, ranks, stop, lambda: watch(jobs) if ranks.leads else None)
            if job.phase == "failed":
                break
        if ranks.leads:
            for job in jobs:
                if job.phase == "queued":
                    job.phase, job.message = "interrupted", "not begun"
            watch(jobs)
        return jobs, ranks.leads


def _state(request: RunRequest) -> tuple[Phase, str, bool]:
    """Phase, message and whether it goes on: how a run stands on the first rank's disk."""
    found = job_of(request)
    return found.phase, found.message, found.resumed


def _run(job: Job, ranks: Ranks, stop: Callable[[], bool], watch: Callable[[], None]) -> None:
    """Make one run on all ranks; how it ended is noted in the job."""
    job.phase, job.began = "running", time.monotonic()

    def after_step() -> bool:
        job.seconds = time.monotonic() - job.began
        watch()
        return stop()

    with warnings_as_text(job.warnings.append):
        try:
            job.phase, job.message = execute(job.request, after_step, ranks)
        except Exception as error:  # whatever ends a run is noted in its job, and the next run is made
            job.phase, job.message = "failed", message_of(error)
            if not (ranks.leads or isinstance(error, RoundoffError)):  # the first rank raises and reports the others
                print(f"rank {ranks.index}: {job.message}", file=sys.stderr)


def _check_agreement(requests: Sequence[RunRequest], ranks: Ranks) -> None:
    """Refuse ranks that would make different runs, or make them with different packages."""
    from roundoff.config import training_in_force

    runs = [
        f"{r.experiment.id} {r.profile.name}-{result_hash(r.experiment, r.profile)} seed {r.seed}" for r in requests
    ]
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    ranks.agree("the configuration", f"{len(runs)} runs from {runs[0]} on (all: {digest})")
    ranks.agree("the device", requests[0].profile.device)
    ranks.agree("versions", ", ".join(f"{name} {package_version(name)}" for name in PACKAGES))
    smallest = min(training_in_force(r.experiment.algorithm, r.profile.training).prompts_per_step for r in requests)
    given = min(request.profile.training.prompts_per_step for request in requests)
    if smallest < ranks.count:
        raise ConfigError(
            f"profile.training.prompts_per_step must be at least {ranks.count}, the number of ranks, but is {smallest}"
            + (" (algorithm.ratio = 'one' makes a step of each minibatch)" if smallest < given else "")
        )
