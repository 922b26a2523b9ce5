"""`roundoff build-tiny`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("build-tiny")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of weights and problems.")
def build_tiny_command(out: Path, seed: int) -> None:
    """Rebuild the embedded model from its recipe into the directory OUT (minutes on one core)."""
    from roundoff.models.tiny.recipe import build

    build(out, seed=seed, progress=click.echo)
