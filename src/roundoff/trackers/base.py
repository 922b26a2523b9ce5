"""The interface of a tracker, what it is told about its run, and a guard that keeps its failure from stopping runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin

from pydantic import BaseModel

from roundoff.config import Experiment, Profile, flatten, result_hash
from roundoff.errors import RoundoffWarning

Ended = Literal["complete", "untrained", "interrupted", "failed"]
"""How a run ended. `untrained`: it took all its steps without training anything. `interrupted`: it can be resumed."""
NAMES = ("experiment.id", "experiment.title", "experiment.baseline", "profile.title", "profile.device")
"""Settings that are not hyperparameters: they name a run or say where it runs, and change no result."""


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """Where Weights & Biases keeps a run."""

    project: str = "roundoff"
    online: bool = False
    """Whether to send data over the network; otherwise the run stays on this machine until `wandb sync`."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told about its run; every name comes from the configuration."""

    path: Path
    """The run's directory."""
    experiment: Experiment
    profile: Profile
    seed: int
    resumed_from: int = -1
    """Last step that the run keeps when it resumes (-1: none). Later steps are logged again, and what a tracker already
    holds of them is void."""
    wandb: WandbSettings = field(default_factory=WandbSettings)

    @property
    def group(self) -> str:
        """Name that all seeds of the same settings share, as in the run's path."""
        return f"{self.experiment.id}/{self.profile.name}-{result_hash(self.experiment, self.profile)}"

    @property
    def name(self) -> str:
        """Name of this run, such as `quickstart-noise seed 0`."""
        return f"{self.experiment.id} seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run, as nested plain data."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "profile": self.profile.model_dump(mode="json"),
            "seed": self.seed,
        }


class Tracker(Protocol):
    """Receives the scalars of a run, step by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the scalars of training step `step`; called after each step."""

    def close(self, ended: Ended) -> None:
        """Write out what is pending and how the run ended; called once, at the end."""


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
    """Wraps a tracker: its first failure is reported as a warning, and from then on it is not called any more."""

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
        except Exception as error:  # nothing that a third-party tracker raises may end a run of hours
            reason = str(error) or type(error).__name__
            warnings.warn(
                f"tracker {self._name} failed and is now off; the run goes on: {reason}", RoundoffWarning, stacklevel=3
            )
            self._tracker = NullTracker()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that trackers receive from a row of `metrics.jsonl`.

    A list `x_layers` becomes one scalar `x/layer.i` per layer, and `x_lengths` one scalar `x/length.n` for each class
    of lengths, n being its least; classes without a response are left out. A value of None, which stands for a number
    that was not finite, becomes NaN: that is how trackers show that there was no number.
    """
    values: dict[str, float] = {}
    for name, value in row.items():
        if name.endswith("_lengths"):
            there = {2**i: v for i, v in enumerate(value) if v is not None}
            values |= {f"{name.removesuffix('_lengths')}/length.{n}": _number(v) for n, v in there.items()}
        elif isinstance(value, list):
            values |= {f"{name.removesuffix('_layers')}/layer.{i}": _number(v) for i, v in enumerate(value)}
        elif name not in ("step", "time"):
            values[name] = _number(value)
    return values


def _number(value: float | None) -> float:
    """The value as a float, with NaN for None."""
    return math.nan if value is None else float(value)


def hyper_parameters(experiment: Experiment, profile: Profile) -> dict[str, float | str | bool | None]:
    """Every setting that changes a result, as `path: value`; those of the experiment come first, lists become text.

    A table that the experiment lacks is listed with all its settings None, and one that is a word ("none") with that
    word for each of them, so that every run has the same paths.
    """
    settings = _with_every_table(experiment.model_dump(mode="json"), Experiment)
    flat = flatten({"experiment": settings, "profile": profile.model_dump(mode="json")})
    plain = (bool, int, float, str, type(None))
    return {
        path.removeprefix("experiment."): value if isinstance(value, plain) else str(value)
        for path, value in flat.items()
        if path not in NAMES
    }


def _with_every_table(value: Any, model: type[BaseModel]) -> dict[str, Any]:
    """A table of settings in which every table that its model may have is one, however deep."""
    table = value if isinstance(value, Mapping) else dict.fromkeys(model.model_fields, value)
    return {
        name: entry if (inner := _table_of(model, name)) is None else _with_every_table(entry, inner)
        for name, entry in table.items()
    }


def _table_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a setting that is a table, or may be one; None for any other setting."""
    annotation = model.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
