"""`roundoff tensorboard`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from roundoff.commands.options import RUNS


@click.command("tensorboard")
@click.argument("root", type=click.Path(path_type=Path), default=RUNS, metavar="[RUNS]")
@click.option(
    "--port", type=click.IntRange(min=0), default=6006, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option("--host", help="Address to listen on. [default: this machine alone]")
def tensorboard_command(root: Path, port: int, host: str | None) -> None:
    """Open TensorBoard on the runs below a directory, or on one run, until Ctrl-C."""
    from roundoff.actions.tensorboard import command_line

    command = command_line(root, port=port, host=host)
    os.execv(command[0], command)  # TensorBoard replaces this process and receives its signals
