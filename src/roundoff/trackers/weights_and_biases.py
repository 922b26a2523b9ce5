"""Weights & Biases, offline by default: nothing leaves this machine without `wandb sync` or `--wandb-online`.

The id of the W&B run is kept in the run's directory, so that a run which is stopped and resumed stays one run there.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from roundoff.errors import RoundoffWarning
from roundoff.optional_packages import require
from roundoff.runs.files import write_atomic
from roundoff.trackers.base import Ended, TrackedRun, WandbSettings

EXTRA = "wandb"
IDENTITY = "wandb.json"
"""File in the run's directory that holds the id and the project of its W&B run."""


class WandbTracker:
    """A W&B run: name, group, tags and settings from the configuration, scalars by training step."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = require("wandb", EXTRA)
        identity = _identity(run)
        arguments: dict[str, Any] = {
            "project": identity["project"],
            "id": identity["id"],
            "name": run.name,
            "group": run.group,
            "job_type": "train",
            "tags": [tag for tag in (run.experiment.family, run.experiment.algorithm.name, run.profile.name) if tag],
            "config": run.settings,
            "dir": str(run.path),
            "settings": wandb.Settings(silent=True, console="off"),
        }
        online = _online(wandb, arguments) if run.wandb.online else None
        self._run: Any = wandb.init(mode="offline", **arguments) if online is None else online

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`; W&B accepts no step twice, so a repeated one (with the same values) is skipped."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self, ended: Ended) -> None:
        """Finish the W&B run; a run that failed or trained nothing is marked as failed."""
        self._run.summary["ended"] = ended
        self._run.finish(exit_code=1 if ended in ("failed", "untrained") else 0)


def check_wandb(settings: WandbSettings) -> tuple[WandbSettings, list[str]]:
    """The settings to use, and lines to tell the user; without credentials W&B runs offline.

    Raises:
        ConfigError: if the package is not installed.
    """
    wandb = require("wandb", EXTRA)
    if not settings.online:
        return settings, []
    if wandb.login(prompt=False, verify=False):
        return settings, []
    return WandbSettings(settings.project, online=False), [
        "W&B has no credentials on this machine (`wandb login` stores them): runs are kept offline, in wandb/ of each "
        "run directory, and `wandb sync` sends them later"
    ]


def _online(wandb: ModuleType, arguments: Mapping[str, Any]) -> Any:
    """The W&B run online, or None with a warning if the server cannot be reached."""
    try:
        return wandb.init(mode="online", resume="allow", **arguments)
    except Exception as error:  # no network, no such project, a server that is down
        warnings.warn(f"W&B cannot be reached, so this run is kept offline: {error}", RoundoffWarning, stacklevel=2)
        wandb.teardown()
        return None


def _identity(run: TrackedRun) -> dict[str, str]:
    """Id and project of the W&B run: those kept in the run's directory, or new ones, which are then kept there."""
    path: Path = run.path / IDENTITY
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        if kept["project"] != run.wandb.project:
            warnings.warn(
                f"{run.path} stays in the W&B project {kept['project']!r} that it began in, not "
                f"{run.wandb.project!r}: remove {path} to track it as a new run there",
                RoundoffWarning,
                stacklevel=2,
            )
        return {"id": str(kept["id"]), "project": str(kept["project"])}
    identity = {"id": secrets.token_hex(8), "project": run.wandb.project}
    write_atomic(path, json.dumps(identity) + "\n")
    return identity
