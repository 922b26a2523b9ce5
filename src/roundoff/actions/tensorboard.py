"""What `roundoff tensorboard` runs: the TensorBoard that is installed beside roundoff."""

from __future__ import annotations

import sys
from pathlib import Path

from roundoff.config import ConfigError


def command_line(root: Path, *, port: int, host: str | None) -> list[str]:
    """The command that opens the board on the runs below `root`, with the TensorBoard of this Python.

    Raises:
        ConfigError: if there is nothing to show.
    """
    if next(root.rglob("events.out.tfevents.*"), None) is None:
        raise ConfigError(
            f"there are no TensorBoard files below {root}: `roundoff run` writes them, unless --tracker names others"
        )
    address = [] if host is None else ["--host", host]
    return [sys.executable, "-m", "tensorboard.main", "--logdir", str(root), "--port", str(port), *address]
