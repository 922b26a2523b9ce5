"""The command line. Each command imports what it needs when it runs, so that `--help` and `list` start at once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff import __version__
from roundoff.config import ConfigError, nearest
from roundoff.scan_command import scan_command

if TYPE_CHECKING:
    from roundoff.config import Experiment
    from roundoff.run_dir import Run
    from roundoff.scale.local_grid import RunRequest

RUNS = Path("runs")
REPORT = Path("report")

runs_option = click.option(
    "--runs",
    "root",
    type=click.Path(path_type=Path),
    default=RUNS,
    show_default=True,
    help="Directory that holds the run directories.",
)
profile_option = click.option(
    "--profile", "profile_name", default="tiny", show_default=True, help="Scale: a packaged profile or a TOML file."
)
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Replace a setting, such as hardware.matmul_noise.relative_std=0.2 or profile.training.evaluate_every=5.",
)


seeds_option = click.option("--seeds", default="0-2", show_default=True, help="Seeds: 3, 0-2 or 0,4,7.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Runs at a time. [default: cores / threads of a run]"
)
tracker_option = click.option(
    "--tracker", default="tensorboard", show_default=True, help="Tracker: tensorboard or none."
)
run_argument = click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
step_option = click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run. [default: the last]")


class Commands(click.Group):
    """Commands in the order of a user's work, not of the alphabet; an unknown one names the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in order of definition."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, or an error with a suggestion."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], tuple(self.commands))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="roundoff")
def cli() -> None:
    """Will RL fine-tuning of a language model survive the arithmetic of its chip, and does a remedy help?

    Start with `roundoff run quickstart`, then `roundoff report`.
    """


@cli.command("list")
def list_command() -> None:
    """List the declared experiments, family by family, and the profiles."""
    from roundoff.experiments import families, load_experiment, load_profile, profile_names

    for family, ids in families().items():
        click.secho(family, bold=True)
        width = max(map(len, ids))
        for name in ids:
            experiment = load_experiment(name)
            against = f"  (against {experiment.baseline})" if experiment.baseline else ""
            click.echo(f"  {name:<{width}}  {experiment.title}{against}")
    click.secho("profiles", bold=True)
    for name in profile_names():
        click.echo(f"  {name}  {load_profile(name).title}")


@cli.command()
@click.argument("name")
@profile_option
@set_option
@click.option("--layers/--no-layers", default=True, help="Load the model and list the layers that are touched.")
def show(name: str, profile_name: str, assignments: Sequence[str], layers: bool) -> None:
    """Show the resolved settings of an experiment, the layers it touches and its sigma curve. Nothing is trained."""
    from roundoff import show as showing
    from roundoff.experiments import load_profile, select, with_overrides

    experiments, profile = with_overrides(select([name]), load_profile(profile_name), assignments)
    for experiment in experiments:
        click.echo(showing.settings(experiment, profile))
        if layers:
            click.echo(showing.layers(experiment, profile))
            click.echo(showing.sigma(experiment, profile))


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@profile_option
@seeds_option
@set_option
@runs_option
@workers_option
@tracker_option
def run(
    names: Sequence[str],
    profile_name: str,
    seeds: str,
    assignments: Sequence[str],
    root: Path,
    workers: int | None,
    tracker: str,
) -> None:
    """Run experiments, families or TOML files; complete runs are kept, interrupted ones go on."""
    from roundoff.experiments import load_profile, select, with_overrides
    from roundoff.provenance import provenance
    from roundoff.scale.local_grid import RunRequest

    experiments, profile = with_overrides(select(names), load_profile(profile_name), assignments)
    source = provenance()
    _make_runs(
        [
            RunRequest(experiment, profile, seed, root, source, tracker)
            for seed in parse_seeds(seeds)
            for experiment in experiments
        ],
        workers,
    )


def _make_runs(requests: list[RunRequest], workers: int | None) -> None:
    """Make the runs, say what became of them, and exit."""
    from rich.console import Console

    from roundoff.scale.local_grid import run_grid
    from roundoff.scale.progress import Progress
    from roundoff.trackers import TRACKERS

    tracker = requests[0].tracker
    if tracker not in TRACKERS:
        raise ConfigError(f"--tracker must be one of {', '.join(TRACKERS)}, but is {tracker!r}")
    threads = max(request.profile.threads for request in requests)
    workers = workers or max(1, len(os.sched_getaffinity(0)) // threads)
    progress = Progress(Console(), workers)
    with progress.shown():
        jobs = run_grid(requests, workers=workers, watch=progress.update)
    failed = [job for job in jobs if job.phase == "failed"]
    stopped = [job for job in jobs if job.phase == "interrupted"]
    for message in dict.fromkeys(job.message for job in failed):
        where = [f"{j.request.experiment.id} seed {j.request.seed}" for j in failed if j.message == message]
        click.secho(f"failed: {', '.join(where)}: {message}", fg="red", err=True)
    if stopped:
        click.echo(f"{len(stopped)} runs stopped before their end; the same command goes on with them.", err=True)
    sys.exit(1 if failed else 130 if stopped else 0)


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--epochs", type=int, required=True, help="Epochs of the whole, those already made included.")
@workers_option
@tracker_option
def extend(paths: Sequence[Path], epochs: int, workers: int | None, tracker: str) -> None:
    """Take complete runs further as new runs beside them; what was made is not repeated and stays as it is."""
    from roundoff.extension import begin_extension, differences
    from roundoff.provenance import provenance
    from roundoff.run_dir import find_runs
    from roundoff.scale.local_grid import RunRequest

    parents, skipped = find_runs(paths)
    if not parents or skipped:
        raise ConfigError("\n".join(skipped) or f"there is no run in {', '.join(map(str, paths))}")
    source = provenance()
    requests = []
    for parent in parents:
        experiment, root = begin_extension(parent, epochs, source)
        requests.append(RunRequest(experiment, parent.profile, parent.seed, root, source, tracker))
        if (difference := differences(parent, epochs)) is not None:
            click.echo(f"not a run of {epochs} epochs from scratch: {difference}", err=True)
    _make_runs(requests, workers)


@cli.command("eval")
@click.argument("target", metavar="RUN|MODEL_DIR")
@step_option
@click.option("--hardware", help="Of an experiment, a TOML file, or `none`. [default: the run's own; none for a model]")
@click.option("--profile", "profile_name", help="Task, lengths and draws. [default: the run's own; tiny for a model]")
@click.option("--task", help="Another task, with its default settings.")
@set_option
@click.option("--draws", type=click.IntRange(min=1), help="Noise draws of the deployed score. [default: the profile's]")
@click.option("--samples", type=click.IntRange(min=1), help="Sample so many responses to each problem, for pass@k.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, help="Seed of noise and samples. [default: the run's own; 0 for a model]")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for scores and per-problem outcomes.")
def eval_command(
    target: str,
    step: int | None,
    hardware: str | None,
    profile_name: str | None,
    task: str | None,
    assignments: Sequence[str],
    draws: int | None,
    samples: int | None,
    temperature: float,
    seed: int | None,
    out: Path | None,
) -> None:
    """Score a run, one of its checkpoints, an adapter or a model, deployed (on the hardware) and clean."""
    from roundoff import evaluation_command as command

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists: name another file")
    subject = command.open_subject(
        target, step=step, profile=profile_name, seed=seed, hardware=hardware, task=task, assignments=assignments
    )
    result = command.score_subject(subject, draws=draws, samples=samples or 0, temperature=temperature)
    click.echo(command.describe(result))
    if out is not None:
        command.save(result, out)
        click.echo(f"wrote {out}")


@cli.command()
@run_argument
@click.argument("out", type=click.Path(path_type=Path))
@step_option
def export(path: Path, out: Path, step: int | None) -> None:
    """Write a run's model and tokenizer to OUT, a Hugging Face directory; adapters are merged."""
    from roundoff.export import export as write_model
    from roundoff.run_dir import read_run

    for line in write_model(read_run(path), out, step=step):
        click.echo(line)


@cli.command()
@click.argument("roots", nargs=-1, type=click.Path(path_type=Path), metavar="[RUNS]...")
@click.option("--out", type=click.Path(path_type=Path), default=REPORT, show_default=True, help="Where to write.")
def report(roots: Sequence[Path], out: Path) -> None:
    """Write summary.md, results.csv, results.json and report.html from run directories, and print the table."""
    from rich.console import Console

    from roundoff.report.render import terminal_table, write_report
    from roundoff.report.tables import build_report
    from roundoff.run_dir import find_runs

    chosen = tuple(roots) or (RUNS,)
    runs, skipped = find_runs(chosen)
    if not runs:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ConfigError(f"there are no runs in {', '.join(map(str, chosen))}: `roundoff run` makes them{reasons}")
    built = build_report(runs, skipped, _declared_beside(runs))
    written = write_report(built, out)
    Console().print(terminal_table(built))
    for path in written:
        click.echo(f"wrote {path}")


def _declared_beside(runs: Sequence[Run]) -> list[Experiment]:
    """Declared experiments of the families that the runs belong to: one without runs is reported as missing."""
    from roundoff.experiments import families, load_experiment

    present = {run.experiment.family for run in runs}
    return [load_experiment(name) for family, ids in families().items() if family in present for name in ids]


@cli.command("import-table")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--n", "problems", type=click.IntRange(min=1), help="Test problems behind each score, if no column says.")
@click.option("--baseline", help="Id of the row to compare with, for rows that name none.")
def import_table(file: Path, problems: int | None, baseline: str | None) -> None:
    """Read a table of scores from elsewhere (CSV or Markdown) and say which differences exceed their error."""
    from rich.console import Console

    from roundoff.report.import_table import imported_table, read_table

    Console().print(imported_table(read_table(file, problems=problems, baseline=baseline)))


@cli.command()
@runs_option
def runs(root: Path) -> None:
    """List runs with their status and last scores."""
    from roundoff.run_dir import find_runs

    found, skipped = find_runs((root,))
    for item in found:
        scored = [row for row in item.metrics if "deployed" in row]
        scores = f"deployed {scored[-1]['deployed']:.1%}  clean {scored[-1]['clean']:.1%}" if scored else ""
        at = f"step {item.metrics[-1]['step'] if item.metrics else 0}/{item.status.total_steps}"
        click.echo(f"{item.path}  {item.status.state}  {at}  {scores}  {item.status.reason}".rstrip())
        for line in item.status.warnings:
            click.echo(f"  warning: {line}")
    for line in skipped:
        click.echo(f"skipped: {line}", err=True)


cli.add_command(scan_command)


@cli.command("build-tiny")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of weights and problems.")
def build_tiny(out: Path, seed: int) -> None:
    """Rebuild the embedded model from its recipe into the directory OUT (minutes on one core)."""
    from roundoff.models.tiny.recipe import build

    build(out, seed=seed, progress=click.echo)


def parse_seeds(text: str) -> list[int]:
    """The seeds meant by `3`, `0-2` or `0,4,7`.

    Raises:
        ConfigError: if the text is none of these.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ConfigError(f"--seeds must read 3, 0-2 or 0,4,7, but is {text!r}")
        seeds += range(int(low), int(high if dash else low) + 1)
    if not seeds or len(seeds) != len(set(seeds)):
        raise ConfigError(f"--seeds must name at least one seed and each once, but is {text!r}")
    return seeds


def main() -> None:
    """Entry point: every expected failure is one message and a non-zero exit, without a traceback."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except ValueError as error:
        if not _is_expected(error):
            raise
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.strerror}: {error.filename or 'while writing'}; nothing was left half-written")


def _is_expected(error: ValueError) -> bool:
    """Whether this is an error that roundoff raises on purpose, for the user to read."""
    return isinstance(error, ConfigError) or type(error).__module__.startswith("roundoff.")


def _fail(message: str) -> None:
    click.secho(f"roundoff: {message}", fg="red", err=True)
    sys.exit(2)
