"""Options that several commands share, and the functions that read and check their text."""

from __future__ import annotations

from pathlib import Path

import click

from roundoff.config import ConfigError
from roundoff.trackers import WandbSettings, check_trackers

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
    "--profile",
    "profile_name",
    default="tiny",
    show_default=True,
    help="Scale of the runs: a packaged profile or a TOML file.",
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
    "--workers", type=click.IntRange(min=1), help="Number of runs at a time. [default: cores / threads of a run]"
)
tracker_option = click.option(
    "--tracker",
    default="tensorboard",
    show_default=True,
    help="Where scalars are also sent: tensorboard, wandb, jsonl, several with commas between them, or none.",
)
wandb_project_option = click.option(
    "--wandb-project", metavar="NAME", help="Project in W&B; adds the tracker wandb. [default: roundoff]"
)
wandb_online_option = click.option(
    "--wandb-online", is_flag=True, help="Send runs to W&B over the network while they go on; adds the tracker wandb."
)
run_argument = click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
step_option = click.option(
    "--step", type=click.IntRange(min=0), help="Take the checkpoint of this step. [default: the last]"
)


def chosen_trackers(names: str, project: str | None, online: bool) -> tuple[str, WandbSettings]:
    """The names of the trackers that the options ask for, and W&B's settings; warnings about them are printed.

    Raises:
        ConfigError: if a tracker is unknown, or its package is not installed.
    """
    if (project or online) and "wandb" not in names.split(","):
        names = "wandb" if names == "none" else f"{names},wandb"
    settings = WandbSettings(online=online) if project is None else WandbSettings(project, online)
    wandb, notes = check_trackers(names, settings)
    for note in notes:
        click.secho(f"warning: {note}", fg="yellow", err=True)
    return names, wandb


def check_directory(path: Path, option: str) -> None:
    """Check that `path` is a directory or can become one; called before anything is computed.

    Raises:
        ConfigError: if it, or a directory above it, is a file.
    """
    nearest_there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not nearest_there.is_dir():
        raise ConfigError(f"{option} {path}: {nearest_there} is a file and not a directory")


def check_new_file(path: Path, option: str) -> None:
    """Check that `path` does not exist and can be written; called before anything is computed.

    Raises:
        ConfigError: if it exists, or a directory above it is a file.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: name another file")
    check_directory(path.parent, option)


def parse_seeds(text: str) -> list[int]:
    """The seeds that a text such as `3`, `0-2` or `0,4,7` stands for.

    Raises:
        ConfigError: if the text does not read like that, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not (high.isdecimal() and int(low) <= int(high))):
            raise ConfigError(f"--seeds must read 3, 0-2 or 0,4,7, but is {text!r}")
        seeds += range(int(low), int(high if dash else low) + 1)
    if not seeds or len(seeds) != len(set(seeds)):
        raise ConfigError(f"--seeds must name at least one seed, and none twice, but is {text!r}")
    return seeds
