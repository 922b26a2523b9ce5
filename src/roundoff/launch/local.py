"""Many runs on this machine: each in a process of its own, as many at a time as there are cores.

A run that dies does not affect the others. On Ctrl-C (or SIGTERM) every running run finishes its step, saves and ends;
the same command resumes them later.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from roundoff.errors import message_of, warnings_as_text
from roundoff.launch.readiness import note_obstacles, send_obstacles
from roundoff.launch.request import POLL_S, Job, RunRequest, check_distinct, execute, job_of, stop_requests


def run_grid(
    requests: Sequence[RunRequest], *, workers: int, watch: Callable[[Sequence[Job]], None] = lambda jobs: None
) -> list[Job]:
    """Make every run that is not complete yet; returns all jobs in the order of the requests.

    Args:
        requests: runs to make; no two may share a directory.
        workers: number of processes at a time.
        watch: called a few times a second with all jobs, and once at the end.

    Raises:
        ConfigError: before the first run begins, if none of the runs still to make can begin.
    """
    check_distinct(requests)
    jobs = [job_of(request) for request in requests]
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    # The server from which the runs' processes are forked imports torch once for all of them (no effect on spawn).
    context.set_forkserver_preload(["roundoff.training.loop"])
    passed_on = False
    with stop_requests() as stop:
        _check_ready([job for job in jobs if job.phase == "queued"], context, stop)
        while True:
            for job in jobs:
                _collect_result(job)
            running = [job for job in jobs if job.phase == "running"]
            queued = [] if stop() else [job for job in jobs if job.phase == "queued"]
            if stop() and not passed_on:
                passed_on = True  # a terminal sends Ctrl-C to the runs too; a SIGTERM reaches this process alone
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


def _check_ready(jobs: Sequence[Job], context: Any, stop: Callable[[], bool]) -> None:
    """Find what keeps runs from beginning, in a process like theirs; if that process dies, nothing was found."""
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
    job.process = context.Process(target=make_run_in_process, args=(job.request, theirs), name=str(job.request.path))
    job.process.start()
    theirs.close()
    job.phase, job.began = "running", time.monotonic()


def make_run_in_process(request: RunRequest, result: Connection) -> None:
    """Body of a run's process: sends a `("warning", text)` for each warning, then the run's last phase and its reason.

    If the parent was killed, the run stops as on Ctrl-C, so that the same command can resume it at once.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def send(kind: str, text: str) -> None:
        with suppress(BrokenPipeError):  # the parent is gone; the run's directory tells how the run ended
            result.send_bytes(json.dumps((kind, text)).encode())

    with stop_requests() as stop, warnings_as_text(lambda text: send("warning", text)):
        try:
            phase, reason = execute(request, lambda: stop() or not parent.is_alive())
        except Exception as error:  # of any kind: the parent reports it beside the other runs
            phase, reason = "failed", message_of(error)
        send(phase, reason)


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
