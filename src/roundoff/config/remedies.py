"""Remedies for imperfect hardware: AQN, the SRDD scan that targets it, and adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from roundoff.config.base import Count, Fraction, Positive, Settings
from roundoff.config.hardware import FormatName


class AQN(Settings):
    """Adaptive Quantization Noise: scheduled noise on RMSNorm weights, in rollouts only (arXiv:2510.11696)."""

    sigma_start: Positive
    """Standard deviation in the first interval that has noise."""
    sigma_end: Positive
    """Standard deviation in the last interval."""
    schedule: Literal["epoch", "global", "constant", "linear", "cosine"] = "epoch"
    stages: Count = 10
    """`global`: intervals of the whole run, of which the first has no noise. `epoch`: intervals of each epoch that have
    noise; one interval without noise precedes them."""
    target: Literal["rmsnorm", "linear"] = "rmsnorm"
    noise: Literal["absolute", "relative"] = "absolute"
    """`absolute` is `w + sigma*eps`, as published; `relative` is `w*(1 + sigma*eps)`, whose sigma carries over between
    models."""
    layers: Literal["all", "targeted", "variable", "proportional", "inverse", "ceiling", "zone"] = "all"
    """Multiplier of sigma in each decoder layer: 1 (`all`), or a mode that derives it from the SRDD scan."""

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
    """Settings of the scan behind AQN's multipliers and `precision.keep = "srdd:k"` (docs/srdd.md)."""

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
    """Format of weights and activations during the scan; None scans on the experiment's own hardware."""
    direction: Literal["sensitive", "robust"] = "sensitive"
    """End of the ranking from which multipliers are assigned: the most or the least damaged layers."""
    tokens: Count = 2048
    """Number of calibration tokens, taken from the task's training problems."""


class LoRA(Settings):
    """Low-rank adapters over the installed base; only they are trained, in high precision (arXiv:2106.09685)."""

    rank: Count = 32
    alpha: Positive = 16.0
    """Scale of the adapters' output, which is multiplied by `alpha / rank`."""
    dropout: Fraction = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the Linears that get adapters."""
