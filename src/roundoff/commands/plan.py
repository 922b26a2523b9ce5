"""`roundoff plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roundoff.commands.options import parse_seeds, runs_option, seeds_option, set_option


@click.command("plan")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--effect",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    metavar="POINTS",
    help="Say how many seeds and problems it takes to show a difference of this many points.",
)
@click.option(
    "--profile", "profile_name", help="Scale to plan for. [default with --effect: the profile of most of the runs]"
)
@runs_option
@seeds_option
@set_option
@click.option(
    "--power",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.8,
    show_default=True,
    help="Probability with which the effect should be shown.",
)
@click.option(
    "--comparisons",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Benefits in the table, over which p values are corrected.",
)
@click.option("--problems", help="Sizes of the test set, such as 256,1024. [default: around the present one]")
@click.option("--gpus", type=click.IntRange(min=1), help="Devices, or runs at a time. [default: 1]")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Devices that share one run.")
@click.option(
    "--machine", help="`here` (measured), or the name of an accelerator. [default: here; a100-80gb with --gpus]"
)
@click.option(
    "--memory", type=click.FloatRange(min=0, min_open=True), help="Memory of a device in GB, in place of the table's."
)
@click.option("--prompt-tokens", type=click.FloatRange(min=1), help="Mean length of a prompt.")
@click.option("--response-tokens", type=click.FloatRange(min=1), help="Mean length of a response.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The model's config.json, if the model is not on this machine.",
)
def plan_command(seeds: str, **options: Any) -> None:
    """Say what evidence costs, before anything is run.

    With --effect: the seeds and problems that it takes to show a difference that varies as much as those among the runs
    of the experiments NAME. With --profile alone: the time and memory that these experiments take. [default: all]
    """
    from roundoff.actions.plan import PlanOptions, plan
    from roundoff.actions.terminal import show

    show(plan(PlanOptions(seeds=len(parse_seeds(seeds)), **options)))
