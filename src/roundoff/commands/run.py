"""`roundoff run`."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from roundoff.launch.ray.cluster import RayOptions


@click.command("run")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--family", "chosen", multiple=True, metavar="NAME", help="Run every experiment of a family.")
@click.option("--all", "everything", is_flag=True, help="Run every declared experiment.")
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
    """Run experiments, families or TOML files. Complete runs are kept, and interrupted ones are resumed."""
    from roundoff.actions.run import make_runs, run_requests
    from roundoff.experiments import families_named, load_profile, select, with_overrides

    declared = select([*names, *families_named(chosen)], everything=everything)
    experiments, profile = with_overrides(declared, load_profile(profile_name), assignments)
    trackers = chosen_trackers(tracker, wandb_project, wandb_online)
    pairs = [(experiment, profile) for experiment in experiments]
    sys.exit(make_runs(run_requests(pairs, parse_seeds(seeds), root, *trackers), workers, ray))
