"""`roundoff run` and `roundoff extend`: make runs, and say what became of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff.commands.options import (
    chosen_trackers,
    parse_seeds,
    profile_option,
    runs_option,
    seeds_option,
    set_option,
    tracker_option,
    wandb_online_option,
    wandb_project_option,
    workers_option,
)
from roundoff.commands.ray_options import with_ray_options
from roundoff.commands.terminal import console
from roundoff.config import ConfigError

if TYPE_CHECKING:
    from roundoff.launch.ray.cluster import RayOptions
    from roundoff.launch.request import Job, RunRequest


@click.command("run")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--family", "chosen", multiple=True, metavar="NAME", help="Every experiment of a family.")
@click.option("--all", "everything", is_flag=True, help="Every declared experiment.")
@profile_option
@seeds_option
@set_option
@runs_option
@workers_option
@tracker_option
@wandb_project_option
@wandb_online_option
@with_ray_options
def run_command(
    names: Sequence[str],
    chosen: Sequence[str],
    everything: bool,
    profile_name: str,
    seeds: str,
    assignments: Sequence[str],
    root: Path,
    workers: int | None,
    tracker: str,
    wandb_project: str | None,
    wandb_online: bool,
    ray: RayOptions | None,
) -> None:
    """Run experiments, families or TOML files; complete runs are kept, interrupted ones go on."""
    from roundoff.experiments import families_named, load_profile, select, with_overrides
    from roundoff.launch.request import RunRequest
    from roundoff.runs.provenance import provenance

    declared = select([*names, *families_named(chosen)], everything=everything)
    experiments, profile = with_overrides(declared, load_profile(profile_name), assignments)
    tracker, wandb = chosen_trackers(tracker, wandb_project, wandb_online)
    source = provenance()
    requests = [
        RunRequest(experiment, profile, seed, root, source, tracker, wandb)
        for seed in parse_seeds(seeds)
        for experiment in experiments
    ]
    sys.exit(make_runs(requests, workers, ray))


def make_runs(requests: list[RunRequest], workers: int | None, ray: RayOptions | None = None) -> int:
    """Make the runs and say what became of them; returns the exit code.

    Raises:
        ConfigError, TaskError: before anything is begun, if a task's settings cannot be used.
    """
    from roundoff.launch.local import run_grid
    from roundoff.launch.progress import Progress
    from roundoff.parallel.ranks import launched
    from roundoff.tasks import load_task

    for task in {request.profile.task.model_dump_json(): request.profile.task for request in requests}.values():
        located = task.located()
        load_task(located.name, located.settings)
    threads = max(request.profile.threads for request in requests)
    here = workers or max(1, _cores() // threads)
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
        _tell(failed, stopped, untrained)
    return 1 if failed or untrained else 130 if stopped else 0


def _cores() -> int:
    """Cores that this process may use; on systems that do not say (macOS), all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tell(failed: list[Job], stopped: list[Job], untrained: list[Job]) -> None:
    """Say what went wrong, each message once, and how to go on."""
    for message in dict.fromkeys(job.message for job in failed):
        where = [f"{j.request.experiment.id} seed {j.request.seed}" for j in failed if j.message == message]
        click.secho(f"failed: {', '.join(where)}: {message}", fg="red", err=True)
    for job in untrained:
        name = f"{job.request.experiment.id} seed {job.request.seed}"
        click.secho(f"not trained: {name}: {job.message}; its score is that of an untrained model", fg="red", err=True)
    if stopped:
        click.echo(f"{len(stopped)} runs stopped before their end; the same command goes on with them.", err=True)


def _warn(text: str) -> None:
    click.secho(f"warning: {text}", fg="yellow", err=True)


@click.command("extend")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--epochs", type=int, required=True, help="Epochs of the whole, those already made included.")
@workers_option
@tracker_option
@wandb_project_option
@wandb_online_option
def extend_command(
    paths: Sequence[Path],
    epochs: int,
    workers: int | None,
    tracker: str,
    wandb_project: str | None,
    wandb_online: bool,
) -> None:
    """Take complete runs further as new runs beside them; what was made is not repeated and stays as it is."""
    from roundoff.actions.extend import begin_extension, differences
    from roundoff.launch.request import RunRequest
    from roundoff.runs.provenance import provenance
    from roundoff.runs.record import find_runs

    parents, skipped = find_runs(paths)
    if not parents or skipped:
        raise ConfigError("\n".join(skipped) or f"there is no run in {', '.join(map(str, paths))}")
    tracker, wandb = chosen_trackers(tracker, wandb_project, wandb_online)
    source = provenance()
    requests = []
    for parent in parents:
        experiment, root = begin_extension(parent, epochs, source)
        requests.append(RunRequest(experiment, parent.profile, parent.seed, root, source, tracker, wandb))
        if (difference := differences(parent, epochs)) is not None:
            click.echo(f"not a run of {epochs} epochs from scratch: {difference}", err=True)
    sys.exit(make_runs(requests, workers))
