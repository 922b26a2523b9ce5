"""A run to track, and the few steps that are logged of it."""

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
    """Step s scores s/10 deployed; metrics of the other kinds are there at every step too."""
    for step in range(first, last + 1):
        tracker.log(step, {"deployed": step / 10, "clean": step / 5, "reward": 0.5, "loss": -1.0})
