"""Sends a run's scalars to trackers (TensorBoard, W&B, a plain file) besides its run directory.

A tracker that fails never stops a run. `TRACKERS` is a plain dict; to use a tracker of your own, add a factory to it.
What a run itself records in its directory is in `roundoff.runs`, and the commands' options are in `roundoff.commands`.

Doors: `open_trackers`, `check_trackers`, `scalars`, `TRACKERS`, and the types `Tracker`, `NullTracker`, `TrackedRun`,
`WandbSettings` and `Ended`.
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
"""Factories of trackers by name; each is called with the run to track."""


def open_trackers(names: str, run: TrackedRun) -> Tracker:
    """The trackers that `names` lists (such as `tensorboard,wandb`), each guarded so that its failure stops nothing.

    Called once per run, when its directory exists.

    Raises:
        ConfigError: if a name is unknown.
    """
    return SeveralTrackers([GuardedTracker(partial(TRACKERS[name], run), name) for name in _parsed(names)])


def check_trackers(names: str, wandb: WandbSettings) -> tuple[WandbSettings, list[str]]:
    """Check before any run starts that the trackers are available.

    Returns:
        The settings that W&B can be used with, and lines to tell the user.

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
