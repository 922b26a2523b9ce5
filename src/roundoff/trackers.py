"""Where a run's scalars go besides its run directory. A tracker that fails never stops a run.

`TRACKERS` is a plain dict: add a factory to it to bring your own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from roundoff.config import Experiment, Profile


class Tracker(Protocol):
    """Receives the scalars of a run, step by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of training step `step`."""

    def close(self) -> None:
        """Write out what is pending."""


class NullTracker:
    """Records nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoardTracker:
    """Scalars and hyper-parameters as TensorBoard event files."""

    def __init__(self, directory: Path, experiment: Experiment, profile: Profile, resumed_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_from + 1 if resumed_from else None)
        settings = {"experiment": experiment.model_dump(mode="json"), "profile": profile.model_dump(mode="json")}
        text = "\n".join(f"    {name} = {value}" for name, value in flatten(settings).items())
        self._writer.add_text("settings", text, resumed_from)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class GuardedTracker:
    """Another tracker whose first failure is reported, after which it is left alone."""

    def __init__(self, make: Callable[[], Tracker], name: str) -> None:
        self._name = name
        self._tracker: Tracker = NullTracker()
        self._try(lambda: setattr(self, "_tracker", make()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass `values` on."""
        self._try(lambda: self._tracker.log(step, values))

    def close(self) -> None:
        """Close the tracker."""
        self._try(lambda: self._tracker.close())

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a third-party tracker raises must not end a run of hours
            warnings.warn(f"tracker {self._name} failed and is now off: {error}", stacklevel=3)
            self._tracker = NullTracker()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `path.to.setting: value`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker is given of a row of `metrics.jsonl`; `x_layers` becomes one scalar `x/layer.i` a layer."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            found |= {f"{name.removesuffix('_layers')}/layer.{i}": float(v) for i, v in enumerate(value)}
        elif name not in ("step", "time"):
            found[name] = float(value)
    return found


TRACKERS: dict[str, Callable[[Path, Experiment, Profile, int], Tracker]] = {
    "none": lambda directory, experiment, profile, resumed_from: NullTracker(),
    "tensorboard": TensorBoardTracker,
}
"""Tracker by name: called with its directory, the settings, and the step that the run resumes from."""


def open_tracker(name: str, directory: Path, experiment: Experiment, profile: Profile, resumed_from: int) -> Tracker:
    """The tracker `name`, guarded so that its failure never stops a run."""
    return GuardedTracker(lambda: TRACKERS[name](directory, experiment, profile, resumed_from), name)
