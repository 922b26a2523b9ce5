"""Options that several commands share, and what their text means."""

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
    "--tracker",
    default="tensorboard",
    show_default=True,
    help="Where scalars go too: tensorboard, wandb, jsonl or none; several with commas between them.",
)
wandb_project_option = click.option(
    "--wandb-project", metavar="NAME", help="W&B project; adds the tracker wandb. [default: roundoff]"
)
wandb_online_option = click.option(
    "--wandb-online", is_flag=True, help="Send W&B's runs over the network as they go; adds the tracker wandb."
)
run_argument = click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
step_option = click.option("--step", type=click.IntRange(min=0), help="Checkpoint of a run. [default: the last]")


def chosen_trackers(names: str, project: str | None, online: bool) -> tuple[str, WandbSettings]:
    """The trackers that the options ask for, found to be there; what the user should know of them is printed.

    Raises:
        ConfigError: if one is unknown, or its package is not installed.
    """
    if (project or online) and "wandb" not in names.split(","):
        names = "wandb" if names == "none" else f"{names},wandb"
    wanted = WandbSettings(online=online) if project is None else WandbSettings(project, online)
    wandb, notes = check_trackers(names, wanted)
    for note in notes:
        click.secho(f"warning: {note}", fg="yellow", err=True)
    return names, wandb


def check_directory(path: Path, option: str) -> None:
    """Make sure before anything is computed that `path` is a directory, or can become one.

    Raises:
        ConfigError: if it, or what it lies in, is a file.
    """
    nearest_there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not nearest_there.is_dir():
        raise ConfigError(f"{option} {path}: {nearest_there} is a file and not a directory")


def check_new_file(path: Path, option: str) -> None:
    """Make sure before anything is computed that `path` is free and can be written.

    Raises:
        ConfigError: if it is there already, or lies in what is no directory.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: name another file")
    check_directory(path.parent, option)


def parse_seeds(text: str) -> list[int]:
    """The seeds meant by `3`, `0-2` or `0,4,7`.

    Raises:
        ConfigError: if the text is none of these.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not (high.isdecimal() and int(low) <= int(high))):
            raise ConfigError(f"--seeds must read 3, 0-2 or 0,4,7, but is {text!r}")
        seeds += range(int(low), int(high if dash else low) + 1)
    if not seeds or len(seeds) != len(set(seeds)):
        raise ConfigError(f"--seeds must name at least one seed and each once, but is {text!r}")
    return seeds
