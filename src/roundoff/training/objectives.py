"""The loss of each token, before aggregation: the clipped one and those that may take its place (`algorithm.loss`).

With the advantage A of the rollout, the ratio r = exp(logprob - old_logprob), and sg for "no gradient through it":

    clip       -min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A)          DAPO equation 8 (arXiv:2503.14476)
    dual clip  the same, but at most -dual_clip*A where A < 0             Ye et al. 2020 (arXiv:1912.09729)
    gspo       as clip, with s = exp(mean of logprob - old_logprob over the response) for r, and its own clip range
               (GSPO equations 5 and 7, arXiv:2507.18071), written as GSPO-token (section 4.3, equation 14):
               s_t = sg(s) * pi / sg(pi), whose value and gradient are those of s, as all tokens share one advantage
    cispo      -sg(clip(r, 1 - clip_low, 1 + clip_high)) * A * logprob    CISPO equations 4 and 5 (arXiv:2506.13585)
    reinforce  -A * logprob                                               REINFORCE (Williams 1992)

Importance weights multiply each of them (`policy_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roundoff.config import Algorithm

LOG_SEQUENCE_RATIO_LIMIT = 10.0
"""Log-ratios of responses are clamped to this from above, as in verl's GSPO (nats)."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """The loss of each token, and which of them a clip changes."""

    losses: Float[Tensor, "rollouts tokens"]
    """Differentiable; what is outside the mask does not count."""
    low: Bool[Tensor, "rollouts tokens"]
    """Tokens under negative advantage whose gradient is cut; with CISPO, all whose weight the lower bound raises."""
    high: Bool[Tensor, "rollouts tokens"]
    """Tokens under positive advantage whose gradient is cut; with CISPO, all whose weight the upper bound lowers."""


def token_losses(
    logprobs: Float[Tensor, "rollouts tokens"],
    old: Float[Tensor, "rollouts tokens"],
    ratio: Float[Tensor, "rollouts tokens"],
    advantages: Float[Tensor, "rollouts 1"],
    mask: Bool[Tensor, "rollouts tokens"],
    algorithm: Algorithm,
) -> TokenLosses:
    """The loss of each token under the algorithm's objective.

    Args:
        logprobs: log-probabilities under the policy being trained, 0 outside the mask; the gradient flows here.
        old: those under the policy before this batch's first update, 0 outside the mask.
        ratio: exp(logprobs - old), bounded.
        advantages: one for each rollout.
        mask: response tokens that count.
        algorithm: the settings.
    """
    kind = algorithm.loss_in_force
    if kind == "reinforce":
        nothing = torch.zeros_like(mask)
        return TokenLosses(-advantages * logprobs, nothing, nothing)
    clip_low, clip_high = algorithm.clip_low, algorithm.clip_high
    if kind == "cispo":
        weight = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
        return TokenLosses(
            -weight * advantages * logprobs, (ratio < 1 - clip_low) & mask, (ratio > 1 + clip_high) & mask
        )
    if kind == "gspo":
        clip_low, clip_high = algorithm.gspo_clip_low, algorithm.gspo_clip_high
        ratio = sequence_ratio(logprobs, old, mask)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    low = (ratio < 1 - clip_low) & (advantages < 0) & mask
    high = (ratio > 1 + clip_high) & (advantages > 0) & mask
    if algorithm.dual_clip is not None:
        bound = -algorithm.dual_clip * advantages
        low = low | ((advantages < 0) & (losses > bound) & mask)
        losses = torch.where(advantages < 0, torch.min(losses, bound), losses)
    return TokenLosses(losses, low, high)


def sequence_ratio(
    logprobs: Float[Tensor, "rollouts tokens"],
    old: Float[Tensor, "rollouts tokens"],
    mask: Bool[Tensor, "rollouts tokens"],
) -> Float[Tensor, "rollouts tokens"]:
    """GSPO's ratio of each response, the geometric mean of the ratios of its tokens, once for each token.

    Its gradient with respect to a token's log-probability is the ratio (GSPO-token); divided by the length of the
    response, as `sequence-mean` does, that is the gradient of the ratio itself.
    """
    inside = mask.to(logprobs.dtype)
    length = inside.sum(dim=1, keepdim=True).clamp(min=1)
    log_ratio = ((logprobs - old).detach() * inside).sum(dim=1, keepdim=True) / length
    return (logprobs - logprobs.detach() + log_ratio).clamp(max=LOG_SEQUENCE_RATIO_LIMIT).exp()
