"""Corrections of the difference between rollouts and training, under the names of verl's `rollout_correction`.

Values are those of verl 0.9.1 (`verl.trainer.config.algorithm.RolloutCorrectionConfig`), so that settings carry over.
Beside verl's strings (`"0.5_5.0"`, `"token_k1,seq_max_k2"`) lists are understood, and what is stored are lists. What
each setting computes is in `roundoff.training.correction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import BeforeValidator, model_validator

from roundoff.config.base import LARGEST_FLOAT32, SMALLEST_FLOAT32, Settings, rule

Rejection: TypeAlias = Literal[
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]
"""What a rejection compares with its bounds: k1, k2 or k3 of each token, or the sum, mean or largest of a response."""
Threshold: TypeAlias = float | tuple[float, float]
"""An upper bound, or a lower and an upper one."""
DEFAULT_THRESHOLD = 2.0


def _is_positive(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(_is_positive(one) if isinstance(one, tuple) else _is_normal(one) for one in numbers)


def _is_normal(value: float) -> bool:
    return SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32


POSITIVE = rule(_is_positive, "must be above 0, and a normal number in float32")


def _number(text: str) -> float:
    """The number that a text states; Python's underscores between digits are not understood.

    Raises:
        ValueError: if it states none.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number, or two joined by '_' such as '0.5_5.0'") from None


def _threshold(value: Any) -> Any:
    """Verl's `"upper"` or `"lower_upper"` as a number or a pair; anything else as it is."""
    if not isinstance(value, str):
        return value
    parts = [_number(part) for part in value.split("_")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _names(value: Any) -> Any:
    """Verl's names joined by commas as a list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _thresholds(value: Any) -> Any:
    """One threshold, or verl's thresholds joined by commas, as a list."""
    if isinstance(value, str):
        return tuple(_threshold(part.strip()) for part in value.split(",") if part.strip())
    if isinstance(value, int | float):
        return (value,)
    return tuple(map(_threshold, value)) if isinstance(value, list | tuple) else value


class RolloutCorrection(Settings):
    """How the update corrects for rollouts whose arithmetic was another one than training's."""

    rollout_is: Literal["none", "token", "sequence"] = "none"
    """Importance weights old/rollout: none, one for each token, or their product over the response."""
    rollout_is_threshold: Annotated[Threshold, POSITIVE, BeforeValidator(_threshold)] = DEFAULT_THRESHOLD
    """Upper bound, at which a weight is cut (truncated importance sampling), or a band `[lower, upper]`, outside of
    which it becomes 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Whether weights are divided by their mean over the batch."""
    rollout_rs: Annotated[tuple[Rejection, ...], BeforeValidator(_names)] = ()
    """Rejections: tokens or responses out of bounds leave the loss; several must all be passed."""
    rollout_rs_threshold: Annotated[tuple[Threshold, ...], POSITIVE, BeforeValidator(_thresholds)] = ()
    """Bounds, one for each rejection or one for all: of k1 a band of ratios `[lower, upper]`, or `upper` alone, which
    means `[1 / upper, upper]`; of k2 and k3 the largest value (nats)."""
    bypass_mode: bool = False
    """Whether the rollouts' own log-probabilities are the old ones, so that no pass computes others."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """The loss in bypass mode: the clipped ratio new/rollout, or REINFORCE with the weights new/rollout."""

    @model_validator(mode="before")
    @classmethod
    def _band_of_one(cls, data: Any) -> Any:
        """Two numbers are the band of a single rejection of k1."""
        if isinstance(data, Mapping):
            names, bounds = _names(data.get("rollout_rs", ())), data.get("rollout_rs_threshold", ())
            pair = (
                isinstance(bounds, list | tuple) and len(bounds) == 2 and not any(isinstance(b, list) for b in bounds)
            )
            if isinstance(names, list | tuple) and len(names) == 1 and pair:
                return {**data, "rollout_rs_threshold": (tuple(bounds),)}
        return data

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        lower, upper = self.bounds
        if lower is not None and lower > upper:
            raise ValueError(f".rollout_is_threshold has its bounds reversed: write [{upper:g}, {lower:g}]")
        if lower is not None and not lower <= 1 <= upper:
            raise ValueError(
                f".rollout_is_threshold = [{lower:g}, {upper:g}] must contain 1, the weight of what rollouts and "
                "training agree on"
            )
        if self.rollout_is == "none":
            set_ = self.rollout_is_threshold != DEFAULT_THRESHOLD, self.rollout_is_batch_normalize
            for name, given in zip(("rollout_is_threshold", "rollout_is_batch_normalize"), set_, strict=True):
                if given:
                    raise ValueError(f".{name} does nothing without weights: set rollout_is = 'token' or 'sequence'")
        return self

    @model_validator(mode="after")
    def _rejections_fit(self) -> Self:
        names, bounds = self.rollout_rs, self.rollout_rs_threshold
        if len(set(names)) < len(names):
            raise ValueError(f".rollout_rs names a rejection twice: {', '.join(names)}")
        if bounds and not names:
            raise ValueError(".rollout_rs_threshold does nothing without rollout_rs")
        if names and len(bounds) not in (1, len(names)):
            raise ValueError(
                f".rollout_rs_threshold must be one threshold, or one for each of the {len(names)} rejections, "
                f"but has {len(bounds)}"
            )
        for name, lower, upper in self.rejections:
            if name.endswith("k1"):
                if lower is None or lower > upper:
                    raise ValueError(f".rollout_rs_threshold of {name} has its bounds reversed: {lower:g} > {upper:g}")
                if not lower <= 1 <= upper:
                    raise ValueError(f".rollout_rs_threshold of {name} must contain 1, but is [{lower:g}, {upper:g}]")
            elif lower is not None:
                raise ValueError(
                    f".rollout_rs_threshold of {name} must be one number, its largest value (nats), but is "
                    f"[{lower:g}, {upper:g}]"
                )
        return self

    @model_validator(mode="after")
    def _modes_fit(self) -> Self:
        if not self.bypass_mode:
            if self.loss_type != "ppo_clip":
                raise ValueError(".loss_type is that of bypass mode: set bypass_mode = true, or algorithm.loss instead")
            if self.rollout_is == "none" and not self.rollout_rs:
                raise ValueError("corrects nothing: set rollout_is, rollout_rs or bypass_mode")
        elif self.loss_type == "ppo_clip" and self.rollout_is != "none":
            raise ValueError(
                ".rollout_is does nothing in bypass mode with loss_type = 'ppo_clip', whose ratio new/rollout is the "
                "correction: set rollout_is = 'none', or loss_type = 'reinforce'"
            )
        elif self.rollout_is_batch_normalize:
            raise ValueError(
                ".rollout_is_batch_normalize cannot be had in bypass mode: weights are computed in the update's own "
                "pass, so that their mean would be that of a micro-batch"
            )
        return self

    @property
    def bounds(self) -> tuple[float | None, float]:
        """Lower (None: weights are cut at the upper one) and upper bound of the weights."""
        threshold = self.rollout_is_threshold
        return threshold if isinstance(threshold, tuple) else (None, threshold)

    @property
    def rejections(self) -> tuple[tuple[Rejection, float | None, float], ...]:
        """Each rejection with its lower (None for k2 and k3) and upper bound."""
        thresholds = self.rollout_rs_threshold
        if len(thresholds) == 1:
            thresholds *= len(self.rollout_rs)
        found: list[tuple[Rejection, float | None, float]] = []
        for name, threshold in zip(self.rollout_rs, thresholds, strict=False):
            if isinstance(threshold, tuple):
                found.append((name, *threshold))
            else:
                found.append((name, 1 / threshold if name.endswith("k1") else None, threshold))
        return tuple(found)

    @property
    def has_weights(self) -> bool:
        """Whether the loss is weighted."""
        return self.rollout_is != "none"

    @property
    def rejects_in_pass(self) -> bool:
        """Whether the update's own pass decides what is left out."""
        return self.bypass_mode and bool(self.rollout_rs)

    @property
    def concerns_whole_batch(self) -> bool:
        """Whether rollouts without a gradient matter: their tokens count in a mean or among those that are left."""
        return not self.bypass_mode and (bool(self.rollout_rs) or self.rollout_is_batch_normalize)


REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)
