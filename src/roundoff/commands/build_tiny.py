"""`roundoff build-tiny`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("build-tiny")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", type=click.Choice(["tiny", "tiny-long"]), default="tiny", show_default=True, help="Which one.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and problems.")
def build_tiny_command(out: Path, model: str, seed: int) -> None:
    """Rebuild an embedded model from its recipe into the directory OUT (minutes on one core)."""
    from roundoff.models.tiny.recipe import build

    build(out, model=model, seed=seed, progress=click.echo)
