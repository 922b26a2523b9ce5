"""`roundoff report`, `runs` and `import-table`: what runs and tables say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff.commands.options import REPORT, RUNS, check_directory, runs_option
from roundoff.commands.terminal import show
from roundoff.config import ConfigError

if TYPE_CHECKING:
    from roundoff.config import Experiment
    from roundoff.runs.record import Run


@click.command("report")
@click.argument("roots", nargs=-1, type=click.Path(path_type=Path), metavar="[RUNS]...")
@click.option("--out", type=click.Path(path_type=Path), default=REPORT, show_default=True, help="Where to write.")
def report_command(roots: Sequence[Path], out: Path) -> None:
    """Write summary.md, results.csv, results.json and report.html from run directories, and print the table."""
    from roundoff.report.assemble import build_report
    from roundoff.report.render import terminal_table, write_report
    from roundoff.runs.record import find_runs

    check_directory(out, "--out")
    chosen = tuple(roots) or (RUNS,)
    runs, skipped = find_runs(chosen)
    if not runs:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ConfigError(f"there are no runs in {', '.join(map(str, chosen))}: `roundoff run` makes them{reasons}")
    built = build_report(runs, skipped, _declared_beside(runs))
    written = write_report(built, out)
    show(terminal_table(built))
    for path in written:
        click.echo(f"wrote {path}")


def _declared_beside(runs: Sequence[Run]) -> list[Experiment]:
    """Declared experiments of the families that the runs belong to: one without runs is reported as missing."""
    from roundoff.experiments import families, load_experiment

    present = {run.experiment.family for run in runs}
    return [load_experiment(name) for family, ids in families().items() if family in present for name in ids]


@click.command("import-table")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--n", "problems", type=click.IntRange(min=1), help="Test problems behind each score, if no column says.")
@click.option("--baseline", help="Id of the row to compare with, for rows that name none.")
def import_table_command(file: Path, problems: int | None, baseline: str | None) -> None:
    """Read a table of scores from elsewhere (CSV or Markdown) and say which differences exceed their error."""
    from roundoff.report.import_table import imported_table, read_table

    show(imported_table(read_table(file, problems=problems, baseline=baseline)))


@click.command("runs")
@runs_option
def runs_command(root: Path) -> None:
    """List runs with their status and last scores."""
    from roundoff.launch.progress import not_computed
    from roundoff.runs.record import find_runs

    found, skipped = find_runs((root,))
    if not found and not skipped:
        click.echo(f"there are no runs in {root}: `roundoff run` makes them", err=True)
    for item in found:
        scored = [row for row in item.metrics if "deployed" in row]
        scores = ""
        if scored:
            last = scored[-1]
            lost = not_computed(last, "deployed_")
            scores = f"deployed {last['deployed']:.1%}{lost}  clean {last['clean']:.1%}"
        at = f"step {item.metrics[-1]['step'] if item.metrics else 0}/{item.status.total_steps}"
        title = f"  {item.experiment.title}" if item.experiment.title else ""
        state = f"{item.status.state}{' (not trained)' if item.is_final and item.health.untrained else ''}"
        click.echo(f"{item.path}{title}  {state}  {at}  {scores}  {item.status.reason}".rstrip())
        for line in dict.fromkeys((*item.status.warnings, *item.health.notes())):
            click.echo(f"  warning: {line}")
    for line in skipped:
        click.echo(f"skipped: {line}", err=True)
