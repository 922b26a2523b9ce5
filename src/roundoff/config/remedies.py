"""What helps a model through its hardware: AQN, the SRDD scan that aims it, and adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from roundoff.config.base import Count, Fraction, Positive, Settings
from roundoff.config.hardware import FormatName


class AQN(Settings):
    """Adaptive Quantization Noise: scheduled noise on RMSNorm weights, in rollouts only (arXiv:2510.11696)."""

    sigma_start: Positive
    """Standard deviation at the first interval that has noise."""
    sigma_end: Positive
    """Standard deviation at the last interval."""
    schedule: Literal["epoch", "global", "constant", "linear", "cosine"] = "epoch"
    stages: Count = 10
    """`global`: intervals of the run, the first silent. `epoch`: noisy intervals of each epoch, after a silent one."""
    target: Literal["rmsnorm", "linear"] = "rmsnorm"
    noise: Literal["absolute", "relative"] = "absolute"
    """`absolute`: `w + sigma*eps`, as published. `relative`: `w*(1 + sigma*eps)`, portable between models."""
    layers: Literal["all", "targeted", "variable", "proportional", "inverse", "ceiling", "zone"] = "all"
    """Multipliers of sigma per decoder layer: none, or a mode of the SRDD scan."""

    @model_validator(mode="after")
    def _noise_falls(self) -> Self:
        if self.sigma_end > self.sigma_start:
            raise ValueError(f"sigma_end ({self.sigma_end}) must not be above sigma_start ({self.sigma_start})")
        if self.schedule == "global" and self.stages < 2:
            raise ValueError(
                "would never inject noise: with schedule = 'global' the first stage has none, so stages >= 2"
            )
        return self


class SRDD(Settings):
    """The scan that AQN's multipliers and `precision.keep = "srdd:k"` come from (docs/srdd.md)."""

    metric: Literal[
        "gradient",
        "energy_error",
        "shadow",
        "deadzone_ratio",
        "saturation_ratio",
        "weight_error",
        "exact",
        "relative_error",
        "sqnr",
    ] = "gradient"
    """Metric that ranks the layers; the published experiments used `relative_error`."""
    format: FormatName | None = None
    """Scan with weights and activations in this format; None: on the experiment's own hardware."""
    direction: Literal["sensitive", "robust"] = "sensitive"
    """End of the ranking that multipliers start at: the most or the least damaged layers."""
    tokens: Count = 2048
    """Calibration tokens, taken from the task's training problems."""


class LoRA(Settings):
    """Low-rank adapters over the installed base; only they are trained, in high precision."""

    rank: Count = 32
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
