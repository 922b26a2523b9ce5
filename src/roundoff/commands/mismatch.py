"""`roundoff mismatch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roundoff.commands.options import check_new_file


@click.command("mismatch")
@click.argument("model")
@click.option("--rollout", required=True, help="Hardware of sampling: none, a format, recipe, experiment or TOML file.")
@click.option("--training", required=True, help="Hardware of the training pass, by the same names.")
@click.option("--profile", "profile_name", help="Profile that gives task and lengths. [default: tiny]")
@click.option("--task", help="Take the prompts of another task, with its default settings.")
@click.option("--prompts", type=int, default=128, show_default=True, help="Training problems to sample from.")
@click.option("--group", type=click.IntRange(min=1), default=4, show_default=True, help="Responses to each.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Length limit. [default: the profile's]")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Temperature of sampling.")
@click.option("--cap", type=float, default=2.0, show_default=True, help="Weights above this count as cut.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, npu or mps.")
@click.option("--allow-download", is_flag=True, help="Fetch MODEL from the hub if it is a hub name.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts, samples, noise and resamples.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this JSON file.")
def mismatch_command(model: str, **options: Any) -> None:
    """Measure how far a training pass on one hardware lies from MODEL's rollouts on another, without training.

    MODEL is `tiny`, a directory or a hub name. Intervals are over prompts.
    """
    from roundoff.actions.mismatch import MismatchOptions, run_mismatch

    if options["json_file"] is not None:
        check_new_file(options["json_file"], "--json")
    run_mismatch(MismatchOptions(model=model, **options))
