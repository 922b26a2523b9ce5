"""Other settings of hardware for some modules: `[[hardware.rules]]`, and which modules a rule matches."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Self, TypeAlias

from pydantic import model_validator

from roundoff.config.arithmetic import Accumulator
from roundoff.config.base import rule
from roundoff.config.changes import NONE, NONE_PASSES, Changes, changes_of
from roundoff.config.hardware import MatmulNoise, Precision


class ThresholdChanges(Changes):
    """The deadzone of the modules that a rule matches."""

    threshold: Annotated[float, rule(lambda v: 0 < v < 1, "must be in (0, 1)")]
    """Threshold relative to the largest magnitude of the token (fraction)."""


if TYPE_CHECKING:
    PrecisionChanges: TypeAlias = Changes
    MatmulNoiseChanges: TypeAlias = Changes
    AccumulatorChanges: TypeAlias = Changes
else:
    PrecisionChanges, MatmulNoiseChanges = changes_of(Precision, ("keep",)), changes_of(MatmulNoise)
    AccumulatorChanges = changes_of(Accumulator)


class Rule(Changes):
    """Other settings for some modules; of several rules that match a module, each changes what those before it left."""

    match: tuple[str, ...]
    """Shell patterns of modules, matched against each run of parts of a module's dotted name: `layers.0.*` matches
    `model.layers.0.mlp.up_proj`, and so do `mlp.*` and `up_proj`."""
    precision: Annotated[PrecisionChanges | None, *NONE_PASSES] = None
    matmul_noise: Annotated[MatmulNoiseChanges | None, *NONE_PASSES] = None
    accumulator: Annotated[AccumulatorChanges | None, *NONE_PASSES] = None
    deadzone: Annotated[ThresholdChanges | None, *NONE_PASSES] = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.match:
            raise ValueError("match names no modules: give patterns such as 'layers.0.*' or '*.down_proj'")
        if set(self.written) == {"match"}:
            raise ValueError(
                f"changes nothing for {list(self.match)}: write precision, matmul_noise, accumulator or deadzone"
            )
        return self

    @property
    def formats_of_attention(self) -> tuple[str, ...]:
        """The settings that it gives formats to attention by, such as `precision.kv_cache`."""
        precision = self.written.get("precision")
        written = precision.written if isinstance(precision, Changes) else {}
        return tuple(f"precision.{name}" for name in ("kv_cache", "attention") if written.get(name) not in (None, NONE))

    def matches(self, name: str) -> bool:
        """Whether this rule is about the module with a dotted name."""
        return any(pattern_matches(pattern, name) for pattern in self.match)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a run of parts of a dotted name."""
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return any(fnmatchcase(".".join(parts[start:end]), pattern) for end in ends for start in range(end))
