"""Before training: what AQN's largest sigma does to the model on the task's own texts, compared with the hardware.

An absolute sigma does not carry over between models: 0.05 is slight where norm weights have RMS 1, and drowns them
where they have RMS 0.04. Two measurements show this before a run is spent: the KL divergence to the clean model per
token of the task's training texts, averaged over noise draws, and the ratio of the noise to each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from roundoff.aqn.noise import aqn_noise, aqn_targets, noise_shares
from roundoff.config import AQN
from roundoff.hardware import hardware_phase, installed, plain_arithmetic
from roundoff.models.calibration import (
    Calibration,
    calibration_batches,
    draw_of,
    frozen_evaluation,
    read_batches,
    text_kl,
)
from roundoff.models.load import LoadedModel
from roundoff.models.prompts import Asked
from roundoff.numerics.rng import Key

DRAWS = 4
"""Number of draws of AQN's noise that the divergence is averaged over."""
TOKENS = 512
"""Number of tokens taken from the task's training texts."""
KL_LIMIT = 1.0
"""Divergence, in nats per token, above which a warning is given: the likely next tokens have changed."""
DROWNED = 0.5
"""Ratio of noise to weight (RMS) above which a weight counts as drowned: less than 6 dB of signal to noise."""
ROUNDED_AWAY = 0.5
"""Share of perturbed weights with unchanged bits above which the noise counts as lost in rounding."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What AQN will do to the model at its largest sigma."""

    sigma: float
    """Largest sigma of the run."""
    kl: float
    """KL(clean || with AQN) at that sigma with hardware off: mean over draws, in nats per token."""
    kl_draws: tuple[float, ...]
    """KL(clean || with AQN) of each draw, in nats per token."""
    hardware_kl: float | None
    """KL(clean || on the hardware) without AQN, in nats per token; None for plain arithmetic."""
    tokens: int
    """Number of tokens measured, padding not counted."""
    noise_share: dict[str, float]
    """Ratio of noise to weight (both RMS) of each weight that AQN perturbs, by module name."""

    @property
    def drowned(self) -> dict[str, float]:
        """Weights that are lost in the noise, the worst first."""
        shares = {name: share for name, share in self.noise_share.items() if share > DROWNED}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def warnings(self) -> tuple[str, ...]:
        """What should be changed before a run is spent."""
        messages = []
        advice = "lower aqn.sigma_start, or set aqn.noise = 'relative'"
        if self.drowned:
            name, share = next(iter(self.drowned.items()))
            messages.append(
                f"AQN at sigma {self.sigma:g} drowns {len(self.drowned)} of {len(self.noise_share)} weights "
                f"(noise over weight up to {share:.2g}, in {name}): {advice}"
            )
        if not math.isfinite(self.kl):
            messages.append(
                f"AQN at sigma {self.sigma:g} makes the model's output on the task's texts NaN or infinite: {advice}"
            )
        if self.hardware_kl is not None and not math.isfinite(self.hardware_kl):
            messages.append("the hardware alone makes the model's output on the task's texts NaN or infinite")
        if KL_LIMIT < self.kl < math.inf:
            messages.append(
                f"AQN at sigma {self.sigma:g} moves the model by {self.kl:.2f} nats per token on the task's texts "
                f"(more than {KL_LIMIT:g}): {advice}"
            )
        return tuple(messages)

    def lines(self) -> list[str]:
        """The measurements and warnings as lines of text."""
        worst = max(self.noise_share.items(), key=lambda item: item[1])
        hardware = "" if self.hardware_kl is None else f"; the hardware alone: {self.hardware_kl:.3g}"
        return [
            f"KL to the clean model at sigma {self.sigma:g}: {self.kl:.3g} nats per token "
            f"({min(self.kl_draws):.3g} to {max(self.kl_draws):.3g} in {len(self.kl_draws)} draws, {self.tokens} "
            f"tokens){hardware}",
            f"noise over weight: at most {worst[1]:.2g}, in {worst[0]}",
            *(f"warning: {line}" for line in self.warnings()),
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "warnings": list(self.warnings())}


@torch.no_grad()
def preflight(
    loaded: LoadedModel,
    texts: Sequence[Asked],
    aqn: AQN,
    sigma: float,
    multipliers: Mapping[int, float] | None,
    key: Key,
) -> Preflight:
    """Measure what AQN at `sigma` does to a model, and what its hardware does, if any is installed.

    Args:
        loaded: the model, which is unchanged afterwards, and its tokenizer.
        texts: what to measure on: the first `TOKENS` tokens of them.
        aqn: the settings of AQN.
        sigma: largest sigma of the run.
        multipliers: factor on sigma of each decoder layer; None: 1 in all layers.
        key: of the noise draws.

    Raises:
        ConfigError: if the texts hold no token, or AQN cannot be applied to this model.
    """
    model = loaded.model
    encoded = calibration_batches(loaded.tokenizer, texts, max_tokens=TOKENS, batches=1)
    batches = read_batches(encoded, next(model.parameters()).device)
    tokens = sum(batch.count for batch in batches)
    kl = [0.0] * DRAWS
    hardware_kl = 0.0 if installed(model) is not None else None
    with frozen_evaluation(model):
        for batch in batches:
            with plain_arithmetic(model):
                clean = model(**batch.inputs()).logits
                for draw in range(DRAWS):
                    with aqn_noise(model, sigma, multipliers, key.fold("preflight", draw), aqn):
                        kl[draw] += _divergence(clean, model, batch) / tokens
            if hardware_kl is not None:
                with hardware_phase(model, "rollout"), draw_of(model, key.fold("preflight"), batch):
                    hardware_kl += _divergence(clean, model, batch) / tokens
    shares = noise_shares(model, sigma, multipliers, aqn)
    return Preflight(sigma, fmean(kl), tuple(kl), hardware_kl, tokens, shares)


@torch.no_grad()
def rounded_away(model: nn.Module, sigma: float, multipliers: Mapping[int, float] | None, key: Key, aqn: AQN) -> float:
    """Share of the perturbed weights that are unchanged, because rounding to their dtype removes the noise.

    A bfloat16 weight of 1 has neighbours at a distance of 2^-8 below and 2^-7 above. Noise of standard deviation 0.001
    carries it more than halfway to one of them with probability 0.03.
    """
    shares = noise_shares(model, sigma, multipliers, aqn)
    weights = [target.weight for target in aqn_targets(model, aqn) if shares[target.name]]
    before = [weight.detach().clone() for weight in weights]
    with aqn_noise(model, sigma, multipliers, key, aqn):
        kept = sum(int((weight == old).sum()) for weight, old in zip(weights, before, strict=True))
    return kept / sum(weight.numel() for weight in weights)


def _divergence(clean: torch.Tensor, model: nn.Module, batch: Calibration) -> float:
    """KL divergence from clean logits, summed over the tokens of a batch, in nats."""
    return sum(text_kl(clean, model(**batch.inputs()).logits, batch.mask))
