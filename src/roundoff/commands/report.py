"""`roundoff report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from roundoff.commands.options import REPORT, RUNS, check_directory


@click.command("report")
@click.argument("roots", nargs=-1, type=click.Path(path_type=Path), metavar="[RUNS]...")
@click.option("--out", type=click.Path(path_type=Path), default=REPORT, show_default=True, help="Where to write.")
def report_command(roots: Sequence[Path], out: Path) -> None:
    """Write summary.md, results.csv, results.json and report.html from run directories, and print the table."""
    from roundoff.actions.report import report_of
    from roundoff.actions.terminal import show
    from roundoff.report.render import terminal_table, write_report

    check_directory(out, "--out")
    report = report_of(tuple(roots) or (RUNS,))
    written = write_report(report, out)
    show(terminal_table(report))
    for path in written:
        click.echo(f"wrote {path}")
