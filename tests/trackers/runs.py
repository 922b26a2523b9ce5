"""A run to track, with a few steps to log."""

from pathlib import Path

from roundoff.trackers import TrackedRun, Tracker, WandbSettings
from tests.simulated import experiment, profile


def tracked(
    path: Path, *, resumed_from: int = -1, seed: int = 0, wandb: WandbSettings | None = None, **more
) -> TrackedRun:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"family": "noise", "hardware": {"matmul_noise": {"relative_std": 0.1}}} | more
    what = experiment("noisy", **settings)
    return TrackedRun(path, what, profile(), seed, resumed_from, wandb or WandbSettings())


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    """Log steps `first` to `last`; step s has the deployed score s/10, and every step has metrics of each kind."""
    for step in range(first, last + 1):
        tracker.log(step, {"deployed": step / 10, "clean": step / 5, "reward": 0.5, "loss": -1.0})
