"""Whether runs can begin at all: what would stop every one of them is found once, before the first of them begins.

The checks need torch, so they are made where it is imported anyway: by the process that runs are forked from, or on a
node of the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from roundoff.config import ConfigError, result_hash
from roundoff.errors import message_of

if TYPE_CHECKING:
    from roundoff.launch.request import Job, RunRequest


def obstacles(requests: Sequence[RunRequest]) -> list[str]:
    """For each request, why it cannot begin; an empty text where nothing is in its way."""
    from roundoff.training.checks import check_settings

    known: dict[tuple[str, str, bool], str] = {}  # seeds of one experiment have the same
    found = []
    for request in requests:
        experiment, profile = request.experiment, request.profile
        key = (result_hash(experiment, profile), profile.device, profile.allow_download)
        if key not in known:
            try:
                check_settings(experiment, profile)
                known[key] = ""
            except Exception as error:  # of the settings, or of a task of the user's own
                known[key] = message_of(error)
        found.append(known[key])
    return found


def send_obstacles(requests: Sequence[RunRequest], result: Connection) -> None:
    """Body of a process: sends the obstacles of the requests."""
    found = obstacles(requests)
    with suppress(BrokenPipeError):  # the parent is gone
        result.send(found)


def note_obstacles(jobs: Sequence[Job], found: Sequence[str]) -> None:
    """Mark the jobs that cannot begin as failed.

    Raises:
        ConfigError: if none of them can, with each reason once.
    """
    if found and all(found):
        raise ConfigError("\n".join(dict.fromkeys(found)))
    for job, message in zip(jobs, found, strict=True):
        if message:
            job.phase, job.message = "failed", message
