"""`roundoff export`."""

from __future__ import annotations

from pathlib import Path

import click

from roundoff.commands.options import run_argument, step_option


@click.command("export")
@run_argument
@click.argument("out", type=click.Path(path_type=Path))
@step_option
def export_command(path: Path, out: Path, step: int | None) -> None:
    """Write a run's model and tokenizer to OUT, a Hugging Face directory; adapters are merged."""
    from roundoff.actions.export import export
    from roundoff.runs.record import read_run

    for line in export(read_run(path), out, step=step):
        click.echo(line)
