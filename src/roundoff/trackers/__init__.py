"""Where a run's scalars go besides its run directory. A tracker that fails never stops a run.

`TRACKERS` is a plain dict: add a factory to it to bring your own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from roundoff.config import ConfigError, nearest
from roundoff.trackers.base import (
    Ended,
    GuardedTracker,
    NullTracker,
    SeveralTrackers,
    TrackedRun,
    Tracker,
    WandbSettings,
    scalars,
)

__all__ = [
    "TRACKERS",
    "Ended",
    "NullTracker",
    "TrackedRun",
    "Tracker",
    "WandbSettings",
    "check_trackers",
    "open_trackers",
    "scalars",
]


def _jsonl(run: TrackedRun) -> Tracker:
    from roundoff.trackers.jsonl import JsonlTracker

    return JsonlTracker(run)


def _tensorboard(run: TrackedRun) -> Tracker:
    from roundoff.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(run)


def _wandb(run: TrackedRun) -> Tracker:
    from roundoff.trackers.weights_and_biases import WandbTracker

    return WandbTracker(run)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "none": lambda run: NullTracker(),
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "jsonl": _jsonl,
}
"""Tracker by name: called with the run that it is to track."""


def open_trackers(names: str, run: TrackedRun) -> Tracker:
    """The trackers `names` (such as `tensorboard,wandb`), each guarded so that its failure stops nothing.

    Raises:
        ConfigError: if one is unknown.
    """
    return SeveralTrackers([GuardedTracker(partial(TRACKERS[name], run), name) for name in _parsed(names)])


def check_trackers(names: str, wandb: WandbSettings) -> tuple[WandbSettings, list[str]]:
    """Make sure before anything is run that the trackers can be had; returns W&B's settings and what to tell the user.

    Raises:
        ConfigError: if a tracker is unknown, or its package is not installed.
    """
    if "wandb" not in _parsed(names):
        return wandb, []
    from roundoff.trackers.weights_and_biases import check_wandb

    return check_wandb(wandb)


def _parsed(names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        if name not in TRACKERS:
            raise ConfigError(
                f"--tracker must be one of {', '.join(TRACKERS)}, or several with commas between them, but is "
                f"{name!r}{nearest(name, tuple(TRACKERS))}"
            )
    if not chosen or ("none" in chosen and len(chosen) > 1) or len(set(chosen)) < len(chosen):
        raise ConfigError(f"--tracker must name each tracker once, or be none, but is {names!r}")
    return chosen
