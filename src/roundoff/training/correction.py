"""Corrections of the difference between the arithmetic of rollouts and that of training: weights and rejections.

Axes: `rollouts` (N), `tokens` (T, response tokens). With `d = old - rollout` for each response token (nats), clamped to
+-20, and r = exp(d), which is the probability of training over that of the rollout:

    weight of a token     exp(d)                     r of the token ("token")
    weight of a response  exp(sum of d)              the product of its r ("sequence"), also clamped to +-20
    k1 = -d,  k2 = d**2 / 2,  k3 = exp(d) - 1 - d    estimates of KL(rollout || training) (Schulman 2020,
                                                     joschu.net/blog/kl-approx.html)

Everything is defined as in verl 0.9.1 (`verl/trainer/ppo/rollout_corr_helper.py`), which follows "When Speed Kills
Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (Liu et al. 2025, richardli.xyz/rl-collapse).

**What is left out counts as in verl.** A rejected token leaves the loss, its KL term and its entropy bonus. It leaves
the normalizer of `token-mean` and the length of its rollout in `sequence-mean`; the number of rollouts stays. In bypass
mode, where the update's own pass decides, the normalizer of `token-mean` stays as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from roundoff.config import Rejection, RolloutCorrection
from roundoff.numerics.transfer import fetch
from roundoff.training.loss import LOG_RATIO_LIMIT, widest_float

SMALLEST_MEAN = 1e-8
"""Weights whose mean is not above this are not normalized, as in verl: all of them were cut to 0."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction makes of rollouts, without gradient."""

    weights: Float[Tensor, "rollouts tokens"] | None
    """Factors of the loss of each token, 0 outside the mask; None without weights."""
    kept: Bool[Tensor, "rollouts tokens"]
    """The response tokens that no rejection has left out."""
    sums: Float[Tensor, " sums"]
    """What metrics are made of, in the order of `SUMS`; adds up over rollouts."""


SUMS = ("tokens", "rollouts", "weights", "squares", "normalized", "high", "low", "rejected", "touched")
"""Response tokens; rollouts with any; weights summed over tokens, and their squares; weights summed over what has one
(tokens or rollouts); how many of these are above the upper and below the lower bound; tokens that were rejected; and
rollouts with such a token."""


def corrected(
    old_logprobs: Float[Tensor, "rollouts tokens"],
    rollout_logprobs: Float[Tensor, "rollouts tokens"],
    mask: Shaped[Tensor, "rollouts tokens"],
    correction: RolloutCorrection,
) -> Corrected:
    """Weights and rejections for rollouts; `rollout_is_batch_normalize` is left to `correct`, which knows the batch.

    Args:
        old_logprobs: log-probabilities of a training pass (in bypass mode: of the update's own pass), in nats.
        rollout_logprobs: those that the sampler recorded.
        mask: non-zero on response tokens. Values elsewhere, NaN included, have no influence.
        correction: the settings.
    """
    inside = mask.bool()
    d = torch.where(inside, old_logprobs.detach() - rollout_logprobs.detach(), 0.0).to(torch.float32)
    kept = kept_tokens(d, inside, correction)
    weights = importance_weights(d, inside, correction) if correction.has_weights else None
    return Corrected(weights, kept, _sums(d, inside, kept, weights, correction))


def importance_weights(
    d: Float[Tensor, "rollouts tokens"], inside: Bool[Tensor, "rollouts tokens"], correction: RolloutCorrection
) -> Float[Tensor, "rollouts tokens"]:
    """Importance weights of tokens or responses, bounded; 0 outside the mask.

    With an upper bound C: min(r, C), truncated importance sampling (Ionides 2008; V-trace of Espeholt et al. 2018,
    arXiv:1802.01561; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). With a
    band: r inside and 0 outside, IcePop's masked calibration (Ling Team 2025, arXiv:2510.18855), which verl applies to
    responses too. Weights of responses are the product of the ratios of its tokens, without truncation the unbiased
    weight; its variance grows with the length.

    Args:
        d: log-ratios old - rollout (nats), 0 outside the mask.
        inside: response tokens.
        correction: the settings.
    """
    lower, upper = correction.bounds
    log_weights = d if correction.rollout_is == "token" else d.sum(dim=1, keepdim=True)
    weights = log_weights.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if lower is None:
        weights = weights.clamp(max=upper)
    else:
        weights = torch.where((weights >= lower) & (weights <= upper), weights, 0.0)
    return weights * inside


def kept_tokens(
    d: Float[Tensor, "rollouts tokens"], inside: Bool[Tensor, "rollouts tokens"], correction: RolloutCorrection
) -> Bool[Tensor, "rollouts tokens"]:
    """The response tokens that pass every rejection.

    `token_*` rejects tokens; `seq_*` rejects all tokens of a response by the sum (`seq_sum`), the mean (`seq_mean`;
    of k1 this is the geometric mean of ratios, Liu et al. 2025) or the largest value (`seq_max`) of its tokens. k2 and
    k3 must not be above their bound. k1 must lie between the logarithms of its bounds. Since k1 = -log r, these bound
    the ratio rollout/training, as in verl: for training/rollout they are the reciprocals.

    Args:
        d: log-ratios old - rollout (nats), 0 outside the mask.
        inside: response tokens.
        correction: the settings.
    """
    kept = inside
    for name, lower, upper in correction.rejections:
        values = statistic(d, inside, name)
        if lower is None:
            passed = values <= upper
        else:
            passed = (values >= math.log(lower)) & (values <= math.log(upper))
        kept = kept & passed
    return kept


def statistic(
    d: Float[Tensor, "rollouts tokens"], inside: Bool[Tensor, "rollouts tokens"], rejection: Rejection
) -> Float[Tensor, "rollouts any"]:
    """What a rejection compares with its bounds (nats): [N, T] of tokens, [N, 1] of responses."""
    level, _, kind = rejection.rpartition("_")
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    values = -d if kind == "k1" else 0.5 * d.square() if kind == "k2" else d.exp() - 1.0 - d
    if level == "token":
        return values
    if level == "seq_max":
        return torch.where(inside, values, 0.0).amax(dim=1, keepdim=True)  # k2 and k3 are not negative
    total = torch.where(inside, values, 0.0).sum(dim=1, keepdim=True)
    return total if level == "seq_sum" else total / inside.sum(dim=1, keepdim=True).clamp(min=1)


def _sums(
    d: Tensor, inside: Tensor, kept: Tensor, weights: Tensor | None, correction: RolloutCorrection
) -> Float[Tensor, " sums"]:
    wide, zero = widest_float(d), torch.zeros((), dtype=torch.float32, device=d.device)
    answered = inside.any(dim=1)
    left_out = inside & ~kept
    of_weights = [zero] * 5
    if weights is not None:
        lower, upper = correction.bounds
        by_token = correction.rollout_is == "token"
        raw, counted = (d, inside) if by_token else (d.sum(dim=1), answered)
        each = weights if by_token else weights.amax(dim=1)
        high = (raw > math.log(upper)) & counted
        low = (raw < (-math.log(upper) if lower is None else math.log(lower))) & counted
        of_weights = [
            weights.to(wide).sum(),
            weights.to(wide).square().sum(),
            each.to(wide).sum(),
            high.sum(),
            low.sum(),
        ]
    found = [inside.sum(), answered.sum(), *of_weights, left_out.sum(), left_out.any(dim=1).sum()]
    return torch.stack([one.to(wide) for one in found])


def correct(
    parts: Sequence[Corrected],
    correction: RolloutCorrection,
    gather: Callable[[list[list[float]]], list[list[list[float]]]],
) -> tuple[list[Corrected], list[int], dict[str, float]]:
    """Finish the correction of a batch: weights divided by their mean, if they are to be, and what is logged.

    This waits for the device once. The mean is that over all minibatches and ranks, with one weight for each token or
    response, before any rejection, as in verl.

    Args:
        parts: this rank's rollouts of each minibatch; `sums` of a part without rollouts are 0.
        correction: the settings.
        gather: gives the sums of all ranks, from those of this rank.

    Returns:
        The parts; the response tokens that each minibatch has left, on all ranks; and the metrics.
    """
    own = [one.tolist() for one in fetch([part.sums for part in parts])]
    by_minibatch = [
        [sum(of_ranks) for of_ranks in zip(*ranks, strict=True)] for ranks in zip(*gather(own), strict=True)
    ]
    total = named([sum(column) for column in zip(*by_minibatch, strict=True)])
    left = [round(row[SUMS.index("tokens")] - row[SUMS.index("rejected")]) for row in by_minibatch]
    metrics = metrics_of(total, correction)
    if correction.rollout_is_batch_normalize:
        mean = total["normalized"] / max(1.0, total["tokens" if correction.rollout_is == "token" else "rollouts"])
        mean = mean if mean > SMALLEST_MEAN else 1.0
        metrics["rollout_is_batch_norm_factor"] = mean
        parts = [
            Corrected(None if p.weights is None else p.weights / p.weights.new_tensor(mean), p.kept, p.sums)
            for p in parts
        ]
    return list(parts), left, metrics


def named(sums: Sequence[float]) -> dict[str, float]:
    """Sums by their names in `SUMS`."""
    return dict(zip(SUMS, sums, strict=True))


def metrics_of(total: dict[str, float], correction: RolloutCorrection) -> dict[str, float]:
    """What a step logs of a correction, under verl's names, from the sums over a batch."""
    tokens = max(1.0, total["tokens"])
    metrics: dict[str, float] = {}
    if correction.has_weights:
        counted = tokens if correction.rollout_is == "token" else max(1.0, total["rollouts"])
        squares = total["squares"]
        metrics = {
            "rollout_is_mean": total["weights"] / tokens,
            "rollout_is_eff_sample_size": total["weights"] ** 2 / (tokens * squares) if squares else 0.0,
            "rollout_is_ratio_fraction_high": total["high"] / counted,
            "rollout_is_ratio_fraction_low": total["low"] / counted,
        }
    if correction.rollout_rs:
        metrics["rollout_rs_masked_fraction"] = total["rejected"] / tokens
        metrics["rollout_rs_seq_masked_fraction"] = total["touched"] / max(1.0, total["rollouts"])
    return metrics
