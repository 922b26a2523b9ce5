"""`roundoff verl-config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from roundoff.commands.options import profile_option, set_option


@click.command("verl-config")
@click.argument("name")
@profile_option
@set_option
@click.option("--seed", default=0, show_default=True, help="Seed of the noise, of AQN and of the order of the data.")
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="Parquet file of training problems in verl's form. [default: DATA/train.parquet]",
)
@click.option(
    "--val", type=click.Path(path_type=Path), help="Parquet file of test problems. [default: DATA/val.parquet]"
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="The directory DATA of the parquet files.",
)
@click.option("--write-data", is_flag=True, help="Write the task's problems into the directory DATA (needs pyarrow).")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory for checkpoints. [default: runs/verl/NAME/PROFILE/seed-N]",
)
@click.option(
    "--scan",
    type=click.Path(path_type=Path),
    help="JSON file of the scan that aqn.layers or keep = srdd:k refers to.",
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Accelerators of each node.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of the cluster.")
def verl_config_command(
    name: str,
    profile_name: str,
    assignments: Sequence[str],
    seed: int,
    train: Path | None,
    val: Path | None,
    data: Path,
    write_data: bool,
    out: Path | None,
    scan: Path | None,
    devices: int,
    nodes: int,
) -> None:
    """Print the complete command that runs experiment NAME under verl 0.9.1. Nothing is trained."""
    from roundoff.actions.verl_config import verl_command

    text, absent = verl_command(
        name,
        profile_name,
        assignments,
        seed=seed,
        train=train,
        val=val,
        data=data,
        write_data=write_data,
        out=out,
        scan=scan,
        devices=devices,
        nodes=nodes,
    )
    for path in absent:
        click.secho(f"note: {path} does not exist yet", fg="yellow", err=True)
    click.echo(text)
