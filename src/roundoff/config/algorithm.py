"""The policy-gradient objective and its named values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from roundoff.config.base import (
    LATER,
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Settings,
    Share,
    Whole,
    rule,
)
from roundoff.config.correction import RolloutCorrection
from roundoff.config.ratio import RATIOS, RatioRule

ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "GRPO": {"name": "GRPO", "group_size": 5, "kl_coefficient": 0.001},
    "DAPO": {
        "name": "DAPO",
        "group_size": 8,
        "clip_high": 0.28,
        "dynamic_sampling": True,
        "overlong_buffer": 0.25,
    },
}
"""Defaults of the named algorithms: `[algorithm] name = "GRPO"` starts from them, and every key can be overridden."""


class Algorithm(Settings):
    """The policy-gradient objective; GRPO (arXiv:2402.03300) and DAPO (arXiv:2503.14476) are two instances of it."""

    name: str
    group_size: Annotated[int, rule(lambda v: v >= 2, "must be at least 2: one rollout has no group to compare with")]
    clip_low: Fraction = 0.2
    clip_high: NonNegative = 0.2
    aggregation: Literal["token-mean", "sequence-mean", "dr_grpo"] = "token-mean"
    normalize_std: bool = True
    """Whether a group's centred rewards are divided by their standard deviation."""
    kl_coefficient: NonNegative = 0.0
    kl_estimator: Literal["low_var_kl", "k1", "k2"] = "low_var_kl"
    entropy_coefficient: NonNegative = 0.0
    """Weight of the entropy bonus: the loss is lowered by this times the entropy of the policy's tokens."""
    dynamic_sampling: bool = False
    """Whether groups whose rewards are all equal are dropped and more prompts are drawn until the batch is full."""
    max_sampling_batches: Count = 5
    """Most batches of prompts that dynamic sampling draws in one step."""
    oversampling: Count = 1
    """Prompts that dynamic sampling draws at a time, as a multiple of `prompts_per_step`. An epoch counts every prompt
    drawn, whether it is used or dropped."""
    overlong_buffer: Share = 0.0
    """Final share of the response limit over which a length penalty rises linearly (fraction; 256 of 1,024 is 0.25)."""
    overlong_factor: NonNegative = 0.5
    """Length penalty at the response limit (reward units)."""
    ratio: Literal["replayed", "recomputed", "rollout", "one"] = "replayed"
    """Which pair of log-probabilities the importance ratio compares (`roundoff.config.ratio`)."""
    tis_cap: Positive = 2.0
    """Upper bound of the truncated importance weight with `ratio = "rollout"`."""
    temperature: Annotated[
        float,
        rule(lambda v: LEAST_TEMPERATURE <= v <= MOST_TEMPERATURE, "must be between 0.001 and 1,000,000"),
    ] = 1.0
    top_p: Annotated[float, rule(lambda v: 0 < v <= 1, "must be in (0, 1]")] = 1.0
    top_k: Whole = 0
    """Number of most likely tokens to sample from; 0 keeps the whole vocabulary."""
    optimizer_epochs: Count = 1
    """Passes of the optimizer over one batch of rollouts."""
    correction: Annotated[RolloutCorrection | None, LATER] = None
    """Corrections of the difference between rollouts and training, by verl's names."""
    loss: Annotated[Literal["clip", "gspo", "cispo", "reinforce"], LATER] = "clip"
    """The loss of each token (`roundoff.training.objectives`)."""
    gspo_clip_low: Annotated[Fraction, LATER] = 3e-4
    """Clip range of the ratio of whole responses with `loss = "gspo"`; the defaults are those of its paper."""
    gspo_clip_high: Annotated[NonNegative, LATER] = 4e-4
    dual_clip: Annotated[Annotated[float, rule(lambda v: v > 1, "must be above 1")] | None, LATER] = None
    """Ratio from which a token of negative advantage has no gradient (verl's `clip_ratio_c`); None: there is none."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_named(cls, data: Any) -> Any:
        return {**ALGORITHMS.get(str(data.get("name")), {}), **data} if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.oversampling > 1 and not self.dynamic_sampling:
            raise ValueError(
                f"oversampling = {self.oversampling} draws prompts that nothing uses without dynamic sampling: "
                "set dynamic_sampling = true, or oversampling = 1"
            )
        if not self.ratio_rule.compares and self.optimizer_epochs > 1:
            raise ValueError("ratio = 'one' allows a single optimizer step per batch: set optimizer_epochs = 1")
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> Self:
        if self.correction is None:
            return self
        if self.ratio == "rollout":
            raise ValueError(
                "ratio = 'rollout' is itself a correction (rollout_is = 'token' with the threshold tis_cap): with a "
                "table [algorithm.correction], set ratio = 'recomputed'"
            )
        if self.ratio != "recomputed":
            raise ValueError(
                f"a table [algorithm.correction] does nothing with ratio = {self.ratio!r}, which has no "
                "log-probabilities of a training pass to compare the rollouts' with: set ratio = 'recomputed', also "
                "where rollouts and training are on different hardware"
            )
        if self.correction.bypass_mode and self.optimizer_epochs > 1:
            raise ValueError(
                "correction.bypass_mode allows a single pass over a batch: its ratio holds the difference in "
                "arithmetic beside what earlier passes have learnt, so set optimizer_epochs = 1"
            )
        if self.correction.bypass_mode and self.loss != "clip":
            raise ValueError(
                f"loss = {self.loss!r} does nothing in bypass mode: set correction.loss_type, or bypass_mode = false"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.loss_in_force == "reinforce" and self.optimizer_epochs > 1:
            raise ValueError("loss = 'reinforce' compares with no policy before the update: set optimizer_epochs = 1")
        if self.dual_clip is not None and self.loss_in_force != "clip":
            raise ValueError(f"dual_clip does nothing with loss = {self.loss_in_force!r}: it belongs to 'clip'")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip = {self.dual_clip:g} must be above 1 + clip_high ({1 + self.clip_high:g})")
        return self

    @property
    def loss_in_force(self) -> str:
        """The loss of each token, bypass mode taken into account."""
        correction = self.correction
        bypasses = correction is not None and correction.bypass_mode and correction.loss_type == "reinforce"
        return "reinforce" if bypasses else self.loss

    @property
    def weighs_tokens(self) -> bool:
        """Whether importance weights multiply the loss of each token."""
        return self.ratio_rule.corrects_rollouts or (self.correction is not None and self.correction.has_weights)

    @property
    def ratio_rule(self) -> RatioRule:
        """What `ratio` asks of a training step."""
        found = RATIOS[self.ratio]
        bypasses = self.correction is not None and self.correction.bypass_mode
        return replace(found, takes_rollouts=True) if bypasses else found
