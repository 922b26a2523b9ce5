"""`roundoff compare`."""

from __future__ import annotations

from pathlib import Path

import click

from roundoff.commands.options import runs_option


@click.command("compare")
@click.argument("treatment", metavar="A")
@click.argument("baseline", metavar="B")
@runs_option
@click.option(
    "--margin",
    type=click.FloatRange(min=0, max=100, min_open=True, max_open=True),
    metavar="POINTS",
    help="Also test whether A loses less than this many points against B.",
)
def compare_command(treatment: str, baseline: str, root: Path, margin: float | None) -> None:
    """Compare A with B, paired by seed and problem: experiments by id, directories of experiments, or single runs."""
    from roundoff.actions.compare import compare
    from roundoff.actions.terminal import show
    from roundoff.report.pair import pair_text

    show(pair_text(compare(treatment, baseline, root, margin=None if margin is None else margin / 100)))
