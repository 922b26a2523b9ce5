"""`roundoff sweep`."""

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
    tracker_option,
    wandb_online_option,
    wandb_project_option,
    workers_option,
)
from roundoff.commands.ray_options import with_ray_options

if TYPE_CHECKING:
    from roundoff.launch.ray.cluster import RayOptions


@click.command("sweep")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@profile_option
@seeds_option
@click.option(
    "--set",
    "assignments",
    multiple=True,
    required=True,
    metavar="PATH=VALUE,VALUE",
    help="Values of a setting, such as aqn.sigma_start=0.01,0.05; several settings make every combination.",
)
@runs_option
@workers_option
@tracker_option
@wandb_project_option
@wandb_online_option
@with_ray_options
def sweep_command(
    names: Sequence[str],
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
    """Vary one or a few settings, run each variant beside its baseline, and print the comparison.

    A baseline that is not among NAME is run as it is declared. `roundoff report` draws the same runs.
    """
    from roundoff.actions.run import make_runs, run_requests
    from roundoff.actions.sweep import report_of, swept
    from roundoff.actions.terminal import show
    from roundoff.report.render import terminal_table

    pairs = swept(names, profile_name, assignments)
    trackers = chosen_trackers(tracker, wandb_project, wandb_online)
    each = parse_seeds(seeds)
    requests = run_requests(pairs, each, root, *trackers)
    click.echo(f"{len(pairs)} variants and baselines x {len(each)} seeds: {len(requests)} runs in {root}", err=True)
    code = make_runs(requests, workers, ray)
    if (report := report_of(requests)) is not None:
        show(terminal_table(report))
    sys.exit(code)
