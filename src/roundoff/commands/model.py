"""`roundoff eval`, `export` and `build-tiny`: score a model, write one out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from roundoff.commands.options import check_new_file, run_argument, set_option, step_option
from roundoff.config import ConfigError


@click.command("eval")
@click.argument("target", metavar="RUN|MODEL_DIR")
@step_option
@click.option(
    "--hardware",
    help="Of an experiment or TOML file, a format, or `none`. [default: the run's own, or none]",
)
@click.option("--profile", "profile_name", help="Task, lengths and draws. [default: the run's own]")
@click.option("--task", help="Another task, with its default settings.")
@set_option
@click.option("--draws", type=click.IntRange(min=1), help="Noise draws of the deployed score. [default: the profile's]")
@click.option("--samples", type=click.IntRange(min=1), help="Sample so many responses to each problem, for pass@k.")
@click.option("--temperature", type=click.FloatRange(min=1e-3, max=1e6), help="Of the samples. [default: 1]")
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
    temperature: float | None,
    seed: int | None,
    out: Path | None,
) -> None:
    """Score a run, one of its checkpoints, an adapter or a model, deployed (on the hardware) and clean."""
    from roundoff.actions import evaluate as command

    if out is not None:
        check_new_file(out, "--out")
    if temperature is not None and samples is None:
        raise ConfigError("--temperature is that of --samples, and does nothing to greedy decoding: give --samples too")
    subject = command.open_subject(
        target, step=step, profile=profile_name, seed=seed, hardware=hardware, task=task, assignments=assignments
    )
    result = command.score_subject(subject, draws=draws, samples=samples or 0, temperature=temperature or 1.0)
    click.echo(command.describe(result))
    if out is not None:
        command.save(result, out)
        click.echo(f"wrote {out}")


@click.command("export")
@run_argument
@click.argument("out", type=click.Path(path_type=Path))
@step_option
def export_command(path: Path, out: Path, step: int | None) -> None:
    """Write a run's model and tokenizer to OUT, a Hugging Face directory; adapters are merged."""
    from roundoff.actions.export import export as write_model
    from roundoff.runs.record import read_run

    for line in write_model(read_run(path), out, step=step):
        click.echo(line)


@click.command("build-tiny")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of weights and problems.")
def build_tiny_command(out: Path, seed: int) -> None:
    """Rebuild the embedded model from its recipe into the directory OUT (minutes on one core)."""
    from roundoff.models.tiny.recipe import build

    build(out, seed=seed, progress=click.echo)
