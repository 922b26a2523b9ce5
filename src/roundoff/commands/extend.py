"""`roundoff extend`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from roundoff.commands.options import (
    chosen_trackers,
    tracker_option,
    wandb_online_option,
    wandb_project_option,
    workers_option,
)


@click.command("extend")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--epochs", type=int, required=True, help="Epochs in total, including those already made.")
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
    """Train complete runs further, as new runs beside them; the old runs stay as they are, and no step is repeated."""
    from roundoff.actions.extend import extension_requests, runs_to_extend
    from roundoff.actions.run import make_runs

    parents = runs_to_extend(paths)
    trackers = chosen_trackers(tracker, wandb_project, wandb_online)
    requests, differences = extension_requests(parents, epochs, *trackers)
    for difference in differences:
        click.echo(f"not a run of {epochs} epochs from scratch: {difference}", err=True)
    sys.exit(make_runs(requests, workers))
