"""Runs under torchrun: all ranks share each run, one run after the other, and the first rank writes.

    torchrun --nproc-per-node 2 -m roundoff run quickstart-clean

A run that was stopped on one number of ranks can be resumed on another. When torchrun is told to stop, it sends SIGTERM
to all ranks, and all of them end after the same step. It kills ranks that need more than 30 seconds for that; the run
then resumes from its last checkpoint.
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
    """Make every run that is not complete yet, one after the other; returns all jobs, and whether this rank is first.

    `watch` is called on the first rank alone, after every step. The first run that fails ends the launch, because ranks
    that are no longer at the same point cannot be brought together again.

    Raises:
        ConfigError: if the ranks do not agree on what to make and with which versions, or their devices do not fit.
    """
    from roundoff.models.device import resolve_device

    check_distinct(requests)
    jobs = [Job(request) for request in requests]
    with joined(resolve_device(requests[0].profile.device)) as ranks, stop_requests() as stop:
        check_agreement(requests, ranks)
        for job in jobs:
            if ranks.any(stop()):
                job.phase, job.message = "interrupted", "not begun"
                continue
            job.phase, job.message, job.resumed = ranks.first(lambda job=job: state_on_disk(job.request))  # type: ignore[misc]
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


def state_on_disk(request: RunRequest) -> tuple[Phase, str, bool]:
    """Phase and message of a run as this rank's disk has it, and whether the run would be resumed."""
    job = job_of(request)
    return job.phase, job.message, job.resumed


def _run(job: Job, ranks: Ranks, stop: Callable[[], bool], watch: Callable[[], None]) -> None:
    """Make one run on all ranks, and note in the job how it ended."""
    job.phase, job.began = "running", time.monotonic()

    def after_step() -> bool:
        job.seconds = time.monotonic() - job.began
        watch()
        return stop()

    with warnings_as_text(job.warnings.append):
        try:
            job.phase, job.message = execute(job.request, after_step, ranks)
        except Exception as error:  # of any kind: it is noted in the job, and ends the launch
            job.phase, job.message = "failed", message_of(error)
            if not (ranks.leads or isinstance(error, RoundoffError)):  # the first rank raises and reports the others
                print(f"rank {ranks.index}: {job.message}", file=sys.stderr)


def check_agreement(requests: Sequence[RunRequest], ranks: Ranks) -> None:
    """Refuse ranks that would make different runs, or make them with different packages; every rank calls this.

    Raises:
        ConfigError: saying what differs, or that a step has fewer prompts than there are ranks.
    """
    from roundoff.config import training_in_force

    runs = [
        f"{r.experiment.id} {r.profile.name}-{result_hash(r.experiment, r.profile)} seed {r.seed}" for r in requests
    ]
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    ranks.agree("the configuration", f"{len(runs)} runs from {runs[0]} on (all: {digest})")
    ranks.agree("the device", requests[0].profile.device)
    ranks.agree("versions", ", ".join(f"{name} {package_version(name)}" for name in PACKAGES))
    smallest = min(training_in_force(r.experiment.algorithm, r.profile.training).prompts_per_step for r in requests)
    declared = min(request.profile.training.prompts_per_step for request in requests)
    if smallest < ranks.count:
        raise ConfigError(
            f"profile.training.prompts_per_step must be at least {ranks.count}, the number of ranks, but is {smallest}"
            + (" (algorithm.ratio = 'one' makes a step of each minibatch)" if smallest < declared else "")
        )
