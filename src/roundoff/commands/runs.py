"""`roundoff runs`."""

from __future__ import annotations

from pathlib import Path

import click

from roundoff.commands.options import runs_option


@click.command("runs")
@runs_option
def runs_command(root: Path) -> None:
    """List runs with their status and last scores."""
    from roundoff.actions.runs import describe_run
    from roundoff.runs.record import find_runs

    runs, skipped = find_runs((root,))
    if not runs and not skipped:
        click.echo(f"there are no runs in {root}: `roundoff run` makes them", err=True)
    for run in runs:
        for line in describe_run(run):
            click.echo(line)
    for reason in skipped:
        click.echo(f"skipped: {reason}", err=True)
