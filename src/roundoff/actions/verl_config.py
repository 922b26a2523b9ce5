"""What `roundoff verl-config` does: the command that runs an experiment under verl, and the data it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roundoff.config import ConfigError
from roundoff.experiments import load_profile, select, with_overrides
from roundoff.plugins.verl.command import Resources, command
from roundoff.plugins.verl.parquet import write_problems
from roundoff.tasks import make_task

if TYPE_CHECKING:
    from roundoff.srdd import LayerScan


def verl_command(
    name: str,
    profile_name: str,
    assignments: Sequence[str],
    *,
    seed: int,
    data: Path,
    train: Path | None = None,
    val: Path | None = None,
    write_data: bool = False,
    out: Path | None = None,
    scan: Path | None = None,
    devices: int = 1,
    nodes: int = 1,
) -> tuple[str, list[Path]]:
    """The command line, and those of its data files that do not exist. With `write_data` the files are written.

    Raises:
        ConfigError: if a setting cannot be used, or cannot be carried out under verl.
    """
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
        task = make_task(profile)
        if not task.train()[0].messages:  # verl would put this plain prompt through the chat template all the same
            profile = profile.model_copy(update={"chat": False})
    text = command(experiment, profile, seed, resources, None if scan is None else read_scan(scan))
    if write_data:
        write_problems(task, data, conversations=profile.chat is not False)
    return text, [path for path in (resources.train, resources.val) if not path.is_file()]


def read_scan(path: Path) -> LayerScan:
    """The scan in a file that `roundoff scan` or a run wrote.

    Raises:
        ConfigError: if there is no such file, or it holds no scan.
    """
    from roundoff.srdd import LayerScan

    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        return LayerScan.from_json(json.loads(path.read_text("utf-8")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a scan, which is JSON: {error}") from None
