"""`roundoff eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from roundoff.commands.options import check_new_file, set_option, step_option
from roundoff.config import ConfigError


@click.command("eval")
@click.argument("target", metavar="RUN|MODEL_DIR")
@step_option
@click.option(
    "--hardware",
    help="An experiment, recipe or TOML file whose hardware to use, a format (`roundoff list --formats`), or `none`. "
    "[default: the run's, or none]",
)
@click.option(
    "--profile", "profile_name", help="Profile that gives task, lengths and noise draws. [default: the run's own]"
)
@click.option("--task", help="Another task, with its default settings.")
@set_option
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    help="Noise draws that the deployed score averages over. [default: the profile's]",
)
@click.option("--samples", type=click.IntRange(min=1), help="Also sample this many responses to each problem: pass@k.")
@click.option("--temperature", type=click.FloatRange(min=1e-3, max=1e6), help="Temperature of --samples. [default: 1]")
@click.option("--seed", type=int, help="Seed of noise and samples. [default: the run's own; 0 for a model]")
@click.option("--out", type=click.Path(path_type=Path), help="Write scores and per-problem outcomes to this JSON file.")
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
    from roundoff.actions import evaluate

    if out is not None:
        check_new_file(out, "--out")
    if temperature is not None and samples is None:
        raise ConfigError(
            "--temperature is that of sampled responses, and greedy decoding has none: give --samples too"
        )
    subject = evaluate.open_subject(
        target, step=step, profile=profile_name, seed=seed, hardware=hardware, task=task, assignments=assignments
    )
    result = evaluate.score_subject(subject, draws=draws, samples=samples or 0, temperature=temperature or 1.0)
    click.echo(evaluate.describe(result))
    if out is not None:
        evaluate.save(result, out)
        click.echo(f"wrote {out}")
