"""What a tracker is, what it is told of its run, and the guard that keeps a failing one from stopping a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from roundoff.config import AQN, SRDD, Deadzone, Experiment, LoRA, Profile, result_hash
from roundoff.errors import RoundoffWarning

Ended = Literal["complete", "untrained", "interrupted", "failed"]
"""How a run came to its end: `untrained` reached it without training anything; `interrupted` goes on later."""
OPTIONAL: Mapping[str, type[BaseModel]] = {
    "aqn": AQN,
    "srdd": SRDD,
    "lora": LoRA,
    "hardware.deadzone": Deadzone,
}
"""Tables that an experiment may lack."""
NAMES = ("experiment.id", "experiment.title", "experiment.baseline", "profile.title", "profile.device")
"""Settings that are no hyper-parameters: they name a run and change no result."""


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """Where Weights & Biases keeps a run."""

    project: str = "roundoff"
    online: bool = False
    """Whether to send anything over the network; otherwise the run stays on this machine until `wandb sync`."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of its run; every name comes from the configuration."""

    path: Path
    """The run's directory."""
    experiment: Experiment
    profile: Profile
    seed: int
    resumed_from: int = -1
    """Last step that is not logged again (-1: none); whatever a tracker holds of later steps is void."""
    wandb: WandbSettings = field(default_factory=WandbSettings)

    @property
    def group(self) -> str:
        """Name shared by all seeds of the same settings, as in the run's path."""
        return f"{self.experiment.id}/{self.profile.name}-{result_hash(self.experiment, self.profile)}"

    @property
    def name(self) -> str:
        """Name of this run, such as `quickstart-noise seed 0`."""
        return f"{self.experiment.id} seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run, nested."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "profile": self.profile.model_dump(mode="json"),
            "seed": self.seed,
        }


class Tracker(Protocol):
    """Receives the scalars of a run, step by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of training step `step`."""

    def close(self, ended: Ended) -> None:
        """Write out what is pending, and how the run ended."""


class NullTracker:
    """Records nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self, ended: Ended) -> None:
        """Do nothing."""


class SeveralTrackers:
    """Passes everything on to each of several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass `values` on."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self, ended: Ended) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close(ended)


class GuardedTracker:
    """Another tracker whose first failure is reported, after which it is left alone."""

    def __init__(self, make: Callable[[], Tracker], name: str) -> None:
        self._name = name
        self._tracker: Tracker = NullTracker()
        self._try(lambda: setattr(self, "_tracker", make()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass `values` on."""
        self._try(lambda: self._tracker.log(step, values))

    def close(self, ended: Ended) -> None:
        """Close the tracker."""
        self._try(lambda: self._tracker.close(ended))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a third-party tracker raises must not end a run of hours
            reason = str(error) or type(error).__name__
            warnings.warn(
                f"tracker {self._name} failed and is now off; the run goes on: {reason}", RoundoffWarning, stacklevel=3
            )
            self._tracker = NullTracker()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `path.to.setting: value`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker is given of a row of `metrics.jsonl`; `x_layers` becomes one scalar `x/layer.i` a layer.

    A number that is not finite is passed on as NaN, which is how trackers show that there was none.
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            found |= {f"{name.removesuffix('_layers')}/layer.{i}": _number(v) for i, v in enumerate(value)}
        elif name not in ("step", "time"):
            found[name] = _number(value)
    return found


def _number(value: float | None) -> float:
    """The value as a float; None, as a row read back has it, is NaN again."""
    return math.nan if value is None else float(value)


def hyper_parameters(experiment: Experiment, profile: Profile) -> dict[str, float | str | bool | None]:
    """Every setting that changes a result as `path: value`, the experiment's first; lists are texts.

    An absent table is given with all its settings None, so that every run has the same paths.
    """
    settings = experiment.model_dump(mode="json")
    for path, model in OPTIONAL.items():
        *parents, name = path.split(".")
        table = settings
        for parent in parents:
            table = table[parent]
        if table[name] is None:
            table[name] = dict.fromkeys(model.model_fields)
    flat = flatten({"experiment": settings, "profile": profile.model_dump(mode="json")})
    plain = (bool, int, float, str, type(None))
    return {
        path.removeprefix("experiment."): value if isinstance(value, plain) else str(value)
        for path, value in flat.items()
        if path not in NAMES
    }
