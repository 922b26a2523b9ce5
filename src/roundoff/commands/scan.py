"""`roundoff scan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from roundoff.commands.options import check_new_file


@click.command("scan")
@click.argument("model")
@click.option("--format", "both", help="Format of weights and activations. [default: mxfp4]")
@click.option("--weight", help="Format of weights alone.")
@click.option("--activation", help="Format of activations alone.")
@click.option("--noise", type=float, help="Relative standard deviation of matmul noise (fraction; 5 % is 0.05).")
@click.option("--hardware", help="An experiment, recipe or TOML file whose hardware replaces the four options above.")
@click.option(
    "--profile",
    "profile_name",
    default="tiny",
    show_default=True,
    help="Profile whose task gives the calibration texts.",
)
@click.option("--task", help="Take the texts of another task, with its default settings.")
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take the texts from a file, one a line.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Calibration tokens.")
@click.option("--rank-by", help="Metric that ranks the layers. [default: gradient; shadow with --no-gradient]")
@click.option("--gradient/--no-gradient", default=True, help="Measure the gradient score (a backward pass).")
@click.option("--exact", is_flag=True, help="Measure the KL with each layer alone perturbed (one pass a layer).")
@click.option("--frontier", is_flag=True, help="Print KL against the number of layers kept in high precision.")
@click.option(
    "--multipliers",
    metavar="MODE",
    help="Print AQN's multipliers: targeted, variable, proportional, inverse, ceiling or zone.",
)
@click.option(
    "--direction",
    default="sensitive",
    show_default=True,
    help="Start --multipliers at the most damaged layer (sensitive) or at the least damaged one (robust).",
)
@click.option("--faults", is_flag=True, help="Look for faults of this machine instead.")
@click.option("--replays", type=click.IntRange(min=0), help="Repeats of each product with --faults. [default: 2]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type that the model computes in.",
)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, npu or mps.")
@click.option("--allow-download", is_flag=True, help="Fetch MODEL from the hub if it is a hub name.")
@click.option("--seed", default=0, show_default=True, help="Seed of noise, drawn labels and checksums.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this JSON file.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw layers against metrics in this SVG file.")
def scan_command(model: str, **options: Any) -> None:
    """Measure what a format or matmul noise does to every decoder layer and Linear of MODEL.

    MODEL is `tiny`, a directory or a hub name. The two halves of the texts are also ranked separately, and the two
    rankings are compared.
    """
    from roundoff.actions.scan import ScanOptions, run_scan

    for name, option in (("json_file", "--json"), ("picture", "--picture")):
        if options[name] is not None:
            check_new_file(options[name], option)
    sys.exit(run_scan(ScanOptions(model=model, **options)))
