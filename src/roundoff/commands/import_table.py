"""`roundoff import-table`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("import-table")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--n", "problems", type=click.IntRange(min=1), help="Test problems behind each score, if no column says how many."
)
@click.option("--baseline", help="Id of the row to compare with, for rows that name none.")
def import_table_command(file: Path, problems: int | None, baseline: str | None) -> None:
    """Read a table of scores from elsewhere (CSV or Markdown) and say which differences exceed their error."""
    from roundoff.actions.terminal import show
    from roundoff.report.import_table import imported_table, read_table

    show(imported_table(read_table(file, problems=problems, baseline=baseline)))
