"""`roundoff recommend`."""

from __future__ import annotations

from pathlib import Path

import click

from roundoff.commands.options import check_new_file


@click.command("recommend")
@click.argument("hardware")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the evidence to this JSON file.")
def recommend_command(hardware: str, json_file: Path | None) -> None:
    """Say which remedy was shown to help on HARDWARE, with the evidence and its scale, and what did not help.

    HARDWARE is a format, a recipe, an experiment or a TOML file. Nothing is run: the evidence is that of the studies
    `mismatch` and `remedies`.
    """
    from roundoff.actions.recommend import run_recommend

    if json_file is not None:
        check_new_file(json_file, "--json")
    run_recommend(hardware, json_file)
