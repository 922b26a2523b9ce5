"""How a token is chosen from logits: greedily, or by inverse transform from one uniform number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roundoff.config import TEMPERATURE_RULE, is_temperature
from roundoff.numerics.transfer import put


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How tokens are chosen and where a response ends; checked on creation.

    Raises:
        ValueError: if a setting is out of range.
    """

    max_new_tokens: int
    """Length limit of a response, end token included."""
    temperature: float
    """0 takes the most likely token."""
    top_p: float
    """Share of the probability that the set of most likely tokens must hold; 1 keeps all tokens."""
    top_k: int
    """Number of most likely tokens to sample from; 0 means all."""
    end_tokens: tuple[int, ...]
    """Ids of the tokens that end a response."""
    pad_token: int
    """Id of the padding token."""

    def __post_init__(self) -> None:
        for name, value, holds, rule in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, is_temperature(self.temperature), TEMPERATURE_RULE),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (the whole vocabulary) or more"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, but is {value}")

    def ends(self, vocabulary: int, device: torch.device) -> Bool[Tensor, " vocabulary"]:
        """Whether each token of a vocabulary of this size ends a response."""
        is_end = torch.zeros(vocabulary, dtype=torch.bool)
        is_end[[token for token in self.end_tokens if token < vocabulary]] = True
        return put(is_end, device)


def choose(
    logits: Float[Tensor, "rollouts vocabulary"],
    uniforms: Float[Tensor, " rollouts"] | None,
    settings: SamplingSettings,
) -> tuple[Int[Tensor, " rollouts"], Float[Tensor, " rollouts"]]:
    """The next token of each rollout, and its log-probability in nats before top-k and top-p.

    `uniforms` holds one number in [0, 1) for each rollout; without them the most likely token is chosen.
    """
    if uniforms is None:
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.argmax(dim=-1, keepdim=True)
    else:
        logprobs = torch.log_softmax(logits / settings.temperature, dim=-1)
        probabilities = _cut(logprobs.exp(), settings)
        # float64: the product below stays under the total, so that no token of probability 0 is ever chosen
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        thresholds = uniforms[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=logits.shape[-1] - 1)
    return chosen[:, 0], logprobs.gather(1, chosen)[:, 0]


def _cut(probabilities: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities [rollouts, vocabulary], set to 0 outside the top k, then outside the top-p set of what is left."""
    if 0 < settings.top_k < probabilities.shape[-1]:
        smallest = probabilities.topk(settings.top_k, dim=-1).values[:, -1:]
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
        inside = before < settings.top_p * ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, torch.where(inside, ordered, 0.0))
    return probabilities
