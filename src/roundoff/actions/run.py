"""What `roundoff run` does: makes runs on this machine, under torchrun or on Ray, and says what became of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff.actions.terminal import console
from roundoff.config import ConfigError, Experiment, Profile
from roundoff.launch.local import run_grid
from roundoff.launch.progress import Progress
from roundoff.launch.request import Job, RunRequest
from roundoff.parallel.ranks import launched
from roundoff.runs.provenance import provenance
from roundoff.tasks import load_task
from roundoff.trackers import WandbSettings

if TYPE_CHECKING:
    from roundoff.launch.ray.cluster import RayOptions


def run_requests(
    pairs: Sequence[tuple[Experiment, Profile]],
    seeds: Sequence[int],
    root: Path,
    tracker: str,
    wandb: WandbSettings,
) -> list[RunRequest]:
    """A request for each experiment, on its profile, with each seed: all of the first seed come first."""
    source = provenance()
    return [
        RunRequest(experiment, profile, seed, root, source, tracker, wandb)
        for seed in seeds
        for experiment, profile in pairs
    ]


def make_runs(requests: list[RunRequest], workers: int | None, ray: RayOptions | None = None) -> int:
    """Make the runs with a live display, print what became of them, and return the exit code.

    The code is 0 if every run is complete and trained, 1 if one failed or trained nothing, and 130 if one was stopped.

    Raises:
        ConfigError, TaskError: before any run begins, if a task's settings cannot be used.
    """
    for task in {request.profile.task.model_dump_json(): request.profile.task for request in requests}.values():
        located = task.located()
        load_task(located.name, located.settings)
    threads = max(request.profile.threads for request in requests)
    here = workers or max(1, available_cores() // threads)
    progress = Progress(console(), here)
    leads = True
    with progress.shown():
        if launched():
            from roundoff.launch.ranks import run_in_ranks

            if ray is not None or workers is not None:
                raise ConfigError("under torchrun one run is made at a time: --ray and --workers do nothing there")
            jobs, leads = run_in_ranks(requests, progress.update)
        elif ray is None:
            jobs = run_grid(requests, workers=here, watch=progress.update)
        else:
            from roundoff.launch.ray.grid import run_on_ray

            limit = here if ray.address == "local" else workers
            jobs = run_on_ray(requests, ray, workers=limit, watch=progress.update, warn=_warn)
    failed = [job for job in jobs if job.phase == "failed"]
    stopped = [job for job in jobs if job.phase == "interrupted"]
    untrained = [job for job in jobs if job.is_untrained]
    if leads:
        _print_problems(failed, stopped, untrained)
    return 1 if failed or untrained else 130 if stopped else 0


def available_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _print_problems(failed: list[Job], stopped: list[Job], untrained: list[Job]) -> None:
    """Print what went wrong, each message once, and how to resume."""
    for message in dict.fromkeys(job.message for job in failed):
        names = [f"{j.request.experiment.id} seed {j.request.seed}" for j in failed if j.message == message]
        click.secho(f"failed: {', '.join(names)}: {message}", fg="red", err=True)
    for job in untrained:
        name = f"{job.request.experiment.id} seed {job.request.seed}"
        click.secho(f"not trained: {name}: {job.message}; its score is that of an untrained model", fg="red", err=True)
    if stopped:
        text = "1 run stopped before its end; the same command resumes it."
        if len(stopped) > 1:
            text = f"{len(stopped)} runs stopped before their end; the same command resumes them."
        click.echo(text, err=True)


def _warn(text: str) -> None:
    click.secho(f"warning: {text}", fg="yellow", err=True)
