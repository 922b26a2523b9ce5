"""`roundoff verl-config`: the command that runs an experiment under verl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff.commands.options import profile_option, set_option
from roundoff.config import ConfigError

if TYPE_CHECKING:
    from roundoff.srdd import LayerScan


@click.command("verl-config")
@click.argument("name")
@profile_option
@set_option
@click.option("--seed", default=0, show_default=True, help="Of the noise, AQN and the order of the data.")
@click.option(
    "--train", type=click.Path(path_type=Path), help="Parquet file in verl's form. [default: DATA/train.parquet]"
)
@click.option("--val", type=click.Path(path_type=Path), help="The same for evaluations. [default: DATA/val.parquet]")
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--write-data", is_flag=True, help="Write the task's problems into the directory DATA (needs pyarrow).")
@click.option(
    "--out", type=click.Path(path_type=Path), help="For checkpoints. [default: runs/verl/NAME/PROFILE/seed-N]"
)
@click.option("--scan", type=click.Path(path_type=Path), help="Scan that aqn.layers or keep = srdd:k refers to (JSON).")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Accelerators of each node.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
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
    from roundoff.experiments import load_profile, select, with_overrides
    from roundoff.plugins.verl.command import Resources, command
    from roundoff.plugins.verl.parquet import write_problems

    experiments, profile = with_overrides(select([name]), load_profile(profile_name), assignments)
    if len(experiments) != 1:
        raise ConfigError(f"{name!r} names {len(experiments)} experiments: a command runs one of them")
    if write_data and (train or val):
        raise ConfigError("--write-data writes DATA/train.parquet and DATA/val.parquet: leave out --train and --val")
    experiment = experiments[0]
    resources = Resources(
        train=(train or data / "train.parquet").absolute(),
        val=(val or data / "val.parquet").absolute(),
        out=(out or Path("runs") / "verl" / experiment.id / profile.name / f"seed-{seed}").absolute(),
        devices=devices,
        nodes=nodes,
    )
    if write_data:
        from roundoff.tasks import make_task

        task = make_task(profile)
        if not task.train()[0].messages:  # a plain prompt, which verl would put through the chat template all the same
            profile = profile.model_copy(update={"chat": False})
    text = command(experiment, profile, seed, resources, None if scan is None else read_scan(scan))
    if write_data:
        write_problems(task, data, conversations=profile.chat is not False)
    for path in (resources.train, resources.val):
        if not path.is_file():
            click.secho(f"note: {path} does not exist yet", fg="yellow", err=True)
    click.echo(text)


def read_scan(path: Path) -> LayerScan:
    """The scan in a file that `roundoff scan` or a run wrote.

    Raises:
        ConfigError: if the file is none.
    """
    import json

    from roundoff.srdd import LayerScan

    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        return LayerScan.from_json(json.loads(path.read_text("utf-8")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a scan, which is JSON: {error}") from None
