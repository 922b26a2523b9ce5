"""`roundoff sweep`: vary one or a few settings of experiments and compare what came of it."""

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
from roundoff.commands.run import make_runs
from roundoff.commands.terminal import show
from roundoff.config import ConfigError

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
    help="Values of a setting, such as aqn.sigma_start=0.01,0.05; of several settings every combination is run.",
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

    A baseline that is not named itself is run as it is declared. `roundoff report` draws the same runs.
    """
    from roundoff.experiments import load_profile, select, variants
    from roundoff.launch.request import RunRequest
    from roundoff.parallel.ranks import launched
    from roundoff.report.assemble import build_report
    from roundoff.report.render import terminal_table
    from roundoff.runs.provenance import provenance
    from roundoff.runs.record import read_run

    if launched():
        raise ConfigError("a sweep is many runs, and torchrun makes one larger one: use --workers or --ray")
    chosen = variants(select(names), load_profile(profile_name), assignments)
    tracker, wandb = chosen_trackers(tracker, wandb_project, wandb_online)
    source, each = provenance(), parse_seeds(seeds)
    requests = [
        RunRequest(experiment, profile, seed, root, source, tracker, wandb)
        for seed in each
        for experiment, profile in chosen
    ]
    click.echo(f"{len(chosen)} variants and baselines x {len(each)} seeds: {len(requests)} runs in {root}", err=True)
    code = make_runs(requests, workers, ray)
    made = [read_run(request.path) for request in requests if (request.path / "status.json").exists()]
    if made:
        show(terminal_table(build_report(made)))
    sys.exit(code)
