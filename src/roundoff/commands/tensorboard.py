"""`roundoff tensorboard`: the board of all runs below a directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from roundoff.commands.options import RUNS
from roundoff.config import ConfigError


@click.command("tensorboard")
@click.argument("root", type=click.Path(path_type=Path), default=RUNS, metavar="[RUNS]")
@click.option("--port", type=click.IntRange(min=0), default=6006, show_default=True, help="0 takes any that is free.")
@click.option("--host", help="Address to listen on. [default: this machine alone]")
def tensorboard_command(root: Path, port: int, host: str | None) -> None:
    """Open TensorBoard on the runs below a directory, or on one run, until Ctrl-C."""
    command = command_line(root, port=port, host=host)
    os.execv(command[0], command)  # it takes this process's place, and its signals


def command_line(root: Path, *, port: int, host: str | None) -> list[str]:
    """The command that opens the board, with the TensorBoard of this Python.

    Raises:
        ConfigError: if there is nothing to show.
    """
    if next(root.rglob("events.out.tfevents.*"), None) is None:
        raise ConfigError(
            f"there are no TensorBoard files below {root}: `roundoff run` writes them, unless --tracker differs"
        )
    address = [] if host is None else ["--host", host]
    return [sys.executable, "-m", "tensorboard.main", "--logdir", str(root), "--port", str(port), *address]
