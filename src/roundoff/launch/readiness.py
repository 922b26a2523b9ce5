"""Whether runs can begin at all: what would stop them is found before the first of them begins, and reported once.

The checks need torch, so they are made where it is imported anyway: in a process that is forked like a run's, or on a
node of the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from roundoff.config import ConfigError, result_hash
from roundoff.errors import message_of

if TYPE_CHECKING:
    from roundoff.launch.request import Job, RunRequest


def obstacles(requests: Sequence[RunRequest]) -> list[str]:
    """The reason why each request cannot begin; an empty text for one that can."""
    from roundoff.models.load import skeleton
    from roundoff.training.checks import check_hardware, check_settings

    skeleton_of = cache(skeleton)  # one model serves all experiments
    known: dict[tuple[str, str, bool], str] = {}  # the seeds of one experiment have the same reason
    reasons = []
    for request in requests:
        experiment, profile = request.experiment, request.profile
        key = (result_hash(experiment, profile), profile.device, profile.allow_download)
        if key not in known:
            try:
                check_settings(experiment, profile)
                model = None if experiment.hardware.changes_nothing else skeleton_of(profile.model)
                if model is not None:  # otherwise there is nothing to check, or the model is not on this machine
                    check_hardware(experiment.hardware, model)
                known[key] = ""
            except Exception as error:  # of any kind: a task of the user's own may raise it
                known[key] = message_of(error)
        reasons.append(known[key])
    return reasons


def send_obstacles(requests: Sequence[RunRequest], result: Connection) -> None:
    """Body of a process: sends what `obstacles` returns."""
    reasons = obstacles(requests)
    with suppress(BrokenPipeError):  # the parent is gone
        result.send(reasons)


def note_obstacles(jobs: Sequence[Job], reasons: Sequence[str]) -> None:
    """Mark the jobs that cannot begin as failed; `reasons` are those of `obstacles`.

    Raises:
        ConfigError: if no job can begin, with each reason once.
    """
    if reasons and all(reasons):
        raise ConfigError("\n".join(dict.fromkeys(reasons)))
    for job, message in zip(jobs, reasons, strict=True):
        if message:
            job.phase, job.message = "failed", message
