"""The policy loss: one function for GRPO (arXiv:2402.03300) and DAPO (arXiv:2503.14476), which differ only in settings.

Axes: `rollouts` (N), `tokens` (T, response tokens). For each response token, with advantage A of its rollout:

    ratio  r = exp(logprob - old_logprob)                                     held at 1 with `ratio = "one"`
    policy l = -min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A) * weight     DAPO equation 8; weight is 1 by default,
               or another loss of the token (`algorithm.loss`)                `roundoff.training.objectives`
    KL     k = estimator(logprob, ref_logprob)                                GRPO equation 4
    H        = entropy of the policy at the token                             verl's and trl's bonus, 0 by default
    loss     = sum over tokens of aggregate(l + kl_coefficient*k - entropy_coefficient*H) / normalizer

Aggregation divides each token by: the number of response tokens of the minibatch (`token-mean`, DAPO); its rollout's
number of tokens and the number of rollouts (`sequence-mean`, GRPO as published); the number of rollouts and a constant
length (`dr_grpo`, arXiv:2503.20783).

Off by default: verl's dual clip (a ratio above 3 under a negative advantage), which neither paper has. The entropy is
aggregated like the rest, as in verl; trl averages it over tokens whatever the aggregation of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from roundoff.config import Algorithm
from roundoff.training.objectives import sequence_ratio, token_losses

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this, as in verl (nats): exp(20) = 4.9e8 neither overflows nor hides a broken run."""
LOW_VAR_KL_LIMIT = 10.0
"""The k3 estimate of one token is clamped to this, as verl's `low_var_kl` (nats)."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss of one batch and its metrics. All fields are scalars, and all but `loss` are detached."""

    loss: Shaped[Tensor, ""]
    """Differentiable; the sum over the micro-batches of a minibatch if they share a normalizer."""
    policy_loss: Shaped[Tensor, ""]
    """The part of `loss` that comes from the advantages (adds up over micro-batches)."""
    kl: Shaped[Tensor, ""]
    """KL estimate to the reference, aggregated as the loss, without coefficient (nats; adds up over micro-batches)."""
    clip_low_fraction: Shaped[Tensor, ""]
    """Share of tokens whose gradient the lower clip cuts: ratio under `1 - clip_low`, negative advantage."""
    clip_high_fraction: Shaped[Tensor, ""]
    """Share of tokens whose gradient the upper clip cuts: ratio above `1 + clip_high`, positive advantage."""
    ratio_mean: Shaped[Tensor, ""]
    """Mean of the importance weights: over tokens, of the ratio times `weights`; with GSPO, over responses, of the
    response's ratio times the mean of its tokens' `weights`."""
    ratio_std: Shaped[Tensor, ""]
    """Standard deviation of these importance weights (population)."""
    ratio_ess: Shaped[Tensor, ""]
    """Effective sample size `(sum w)**2 / (n * sum w**2)` of these weights (fraction; 1 if all are equal)."""
    ratios: Shaped[Tensor, ""]
    """Number of these weights: of response tokens, or with GSPO of responses."""
    tokens: Shaped[Tensor, ""]
    """Number of response tokens."""

    def metrics(self) -> dict[str, float]:
        """Every field as a float, for a log."""
        return {name: float(getattr(self, name).detach()) for name in self.__slots__}

    @classmethod
    def nothing(cls, device: torch.device | str = "cpu") -> LossOutput:
        """The output for no rollouts, which changes nothing in `combine`."""
        return cls(*[torch.zeros((), dtype=torch.float32, device=device)] * len(cls.__slots__))

    def stacked(self) -> Float[Tensor, " fields"]:
        """Every field, detached, in the widest floating type of the device."""
        wide = widest_float(self.loss)
        return torch.stack([getattr(self, name).detach().to(wide) for name in self.__slots__])


def policy_loss(
    logprobs: Float[Tensor, "rollouts tokens"],
    old_logprobs: Float[Tensor, "rollouts tokens"] | None,
    ref_logprobs: Float[Tensor, "rollouts tokens"] | None,
    advantages: Float[Tensor, " rollouts"] | Float[Tensor, "rollouts 1"],
    mask: Shaped[Tensor, "rollouts tokens"],
    algorithm: Algorithm,
    *,
    normalizer: float | Float[Tensor, ""] | None = None,
    weights: Float[Tensor, "rollouts tokens"] | None = None,
    entropies: Float[Tensor, "rollouts tokens"] | None = None,
) -> LossOutput:
    """The loss of rollouts under new, old and reference log-probabilities.

    Args:
        logprobs: log-probabilities under the policy being trained; the gradient flows here.
        old_logprobs: those under the policy before this batch's first update. None only with `ratio = "one"`.
            `replayed`: under the noise keys of `logprobs`; `recomputed` and `rollout`: under a draw of their own.
        ref_logprobs: those under the reference policy. With `kl_coefficient` 0 the KL is only measured; above 0 they
            are required.
        advantages: one number for each rollout.
        mask: non-zero on response tokens. Values elsewhere, NaN included, have no influence.
        algorithm: clip range, aggregation, KL and ratio.
        normalizer: the divisor of the sum, which `loss_normalizer` computes from the *whole* minibatch. With it the
            losses of micro-batches add up to the loss of the minibatch, and so do their gradients; means of
            micro-batches would not, because each holds another number of tokens. With data parallelism that averages
            gradients, pass `loss_normalizer(...)` summed over the ranks and divided by their number. None: these
            rollouts are the whole minibatch, and `dr_grpo` takes T as its constant length.
        weights: factors of the policy term, without gradient: `truncated_weights` with `ratio = "rollout"`, those of
            `roundoff.training.correction` with `correction.rollout_is`.
        entropies: entropies of the policy being trained, differentiable (nats); needed with an `entropy_coefficient`.

    Raises:
        ValueError: on shapes that do not fit, or log-probabilities that the settings need and were not given.
    """
    _check(logprobs, old_logprobs, ref_logprobs, advantages, mask, algorithm, weights, entropies)
    mask = mask.bool()
    advantages = advantages.reshape(-1, 1).to(torch.float32)
    logprobs = torch.where(mask, logprobs, 0.0).to(torch.float32)  # masked before any arithmetic: NaN*0 is NaN
    if old_logprobs is None or not algorithm.ratio_rule.compares:
        old = logprobs.detach()
    else:
        old = torch.where(mask, old_logprobs.detach(), 0.0).to(torch.float32)
    ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weight = 1.0 if weights is None else torch.where(mask, weights.detach(), 0.0).to(torch.float32)
    objective = token_losses(logprobs, old, ratio, advantages, mask, algorithm)
    policy = objective.losses * weight

    if normalizer is None:
        normalizer = loss_normalizer(mask, algorithm, mask.shape[1])
    share = _token_shares(mask, algorithm) / normalizer
    policy_part = (policy * share).sum()
    kl_part = torch.zeros_like(policy_part)
    loss = policy_part
    if ref_logprobs is not None:
        reference = torch.where(mask, ref_logprobs.detach(), 0.0).to(torch.float32)
        kl_part = (kl_estimate(logprobs, reference, algorithm) * share).sum()
        loss = policy_part + algorithm.kl_coefficient * kl_part if algorithm.kl_coefficient > 0 else policy_part
    if algorithm.entropy_coefficient > 0 and entropies is not None:
        bonus = (torch.where(mask, entropies, 0.0).to(torch.float32) * share).sum()
        loss = loss - algorithm.entropy_coefficient * bonus
    with torch.no_grad():
        if algorithm.loss_in_force == "reinforce":  # the loss has no ratio, so that the weights alone are used
            ratio, old = torch.ones_like(ratio), logprobs
        if algorithm.loss_in_force == "gspo":
            exact, counted = _weights_of_responses(logprobs, old, mask, weight)
            used = exact.to(torch.float32) * counted
        else:
            used, counted = ratio * weight * mask, mask
            exact = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).to(widest_float(used)).exp() * weight
        return LossOutput(
            loss=loss,
            policy_loss=policy_part.detach(),
            kl=kl_part.detach(),
            clip_low_fraction=objective.low.sum() / mask.sum().clamp(min=1),
            clip_high_fraction=objective.high.sum() / mask.sum().clamp(min=1),
            **_mean_and_size(used.sum(), used.square().sum(), counted.sum()),
            ratio_std=_deviation(exact, counted),
            tokens=mask.sum(),
        )


def loss_normalizer(
    mask: Shaped[Tensor, "rollouts tokens"], algorithm: Algorithm, max_new_tokens: int
) -> Float[Tensor, ""]:
    """The divisor of `policy_loss` for the minibatch with this mask, at least 1.

    `token-mean`: its response tokens. `sequence-mean`: its rollouts that have any. `dr_grpo`: those rollouts times
    `max_new_tokens`, the limit of the run rather than the longest response here (arXiv:2503.20783, listing 1).
    """
    if algorithm.aggregation == "token-mean":
        return mask.sum().clamp(min=1).to(torch.float32)
    sequences = mask.bool().any(dim=1).sum().clamp(min=1).to(torch.float32)
    return sequences * max_new_tokens if algorithm.aggregation == "dr_grpo" else sequences


def truncated_weights(
    old_logprobs: Float[Tensor, "rollouts tokens"],
    rollout_logprobs: Float[Tensor, "rollouts tokens"],
    mask: Shaped[Tensor, "rollouts tokens"],
    algorithm: Algorithm,
) -> Float[Tensor, "rollouts tokens"]:
    """Truncated importance weights `min(exp(old - rollout), tis_cap)`, 0 outside the mask, without gradient.

    They correct the difference between the policy that sampled (a rollout under its own noise, with AQN) and the policy
    before the update as the training pass computes it, while the clipped ratio stays new against old: "truncated
    importance sampling" of Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training",
    after Espeholt et al. 2018 (IMPALA, arXiv:1802.01561) and Ionides 2008. verl calls it `tis_imp_ratio_cap`.
    """
    difference = torch.where(mask.bool(), old_logprobs.detach() - rollout_logprobs.detach(), 0.0).to(torch.float32)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=algorithm.tis_cap) * mask


def kl_estimate(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], algorithm: Algorithm
) -> Float[Tensor, "*shape"]:
    """An estimate of KL(policy || reference) for each token, differentiable in `logprobs` (nats).

    With `d = ref_logprobs - logprobs`: `k1` is -d (unbiased, may be negative), `k2` is d**2/2, `low_var_kl` is
    exp(d) - d - 1, called k3 (Schulman 2020, joschu.net/blog/kl-approx.html; GRPO equation 4), clamped as in verl.

    Below |d| of 1e-3 the three terms of k3 cancel in float32 (at 1e-5 what is left is rounding, and may be negative),
    so its value is computed in float64. Its gradient is that of the float32 formula, bit for bit.
    """
    d = ref_logprobs - logprobs
    if algorithm.kl_estimator == "k1":
        return -d
    if algorithm.kl_estimator == "k2":
        return 0.5 * d.square()
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    differentiable = (d.exp() - d - 1.0).clamp(max=LOW_VAR_KL_LIMIT)
    exact = d.detach().to(widest_float(d))
    value = (exact.expm1() - exact).clamp(max=LOW_VAR_KL_LIMIT).to(d.dtype)
    return value + (differentiable - differentiable.detach())  # the bracket is exactly 0 and carries the gradient


def combine(outputs: Sequence[LossOutput]) -> LossOutput:
    """Combine the outputs of micro-batches that shared a normalizer into that of their minibatch; `loss` is detached.

    Means, spread and effective sample size are those of all ratios together, not means of means.

    Raises:
        ValueError: if `outputs` is empty.
    """
    if not outputs:
        raise ValueError("outputs must hold the loss of at least one micro-batch, but is empty")
    tokens, ratios = (torch.stack([getattr(o, name) for o in outputs]) for name in ("tokens", "ratios"))
    mean, std = (torch.stack([getattr(o, name) for o in outputs]) for name in ("ratio_mean", "ratio_std"))
    share = tokens / tokens.sum().clamp(min=1)
    spread = _mean_and_size((mean * ratios).sum(), ((std.square() + mean.square()) * ratios).sum(), ratios.sum())
    # the variance within micro-batches and that between them: both about a mean, so nothing cancels
    of_ratios = ratios / ratios.sum().clamp(min=1)
    variance = ((std.square() + (mean - spread["ratio_mean"]).square()) * of_ratios).sum()
    return LossOutput(
        loss=torch.stack([o.loss.detach() for o in outputs]).sum(),
        policy_loss=torch.stack([o.policy_loss for o in outputs]).sum(),
        kl=torch.stack([o.kl for o in outputs]).sum(),
        clip_low_fraction=(torch.stack([o.clip_low_fraction for o in outputs]) * share).sum(),
        clip_high_fraction=(torch.stack([o.clip_high_fraction for o in outputs]) * share).sum(),
        ratio_std=variance.sqrt(),
        **spread,
        tokens=tokens.sum(),
    )


def _token_shares(mask: Tensor, algorithm: Algorithm) -> Tensor:
    """Weight [N, T] of each token before the normalizer: 0 outside the mask."""
    inside = mask.to(torch.float32)
    return inside / inside.sum(dim=1, keepdim=True).clamp(min=1) if algorithm.aggregation == "sequence-mean" else inside


def _mean_and_size(total: Tensor, total_of_squares: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Mean and effective sample size (both 0 if there is no ratio) from sums over ratios."""
    ratios = count.clamp(min=1)
    mean, mean_of_squares = total / ratios, total_of_squares / ratios
    return {
        "ratio_mean": mean,
        "ratio_ess": torch.where(mean_of_squares > 0, mean.square() / mean_of_squares, 0.0),
        "ratios": count,
    }


def _weights_of_responses(logprobs: Tensor, old: Tensor, mask: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """GSPO's ratio of each response times the mean weight of its tokens, [N, 1], and which responses have a token."""
    wide = widest_float(logprobs)
    ratio = sequence_ratio(logprobs.to(wide), old.to(wide), mask)[:, :1]
    total = (mask * weight).to(wide).sum(dim=1, keepdim=True)
    return ratio * total / mask.sum(dim=1, keepdim=True).clamp(min=1), mask.any(dim=1, keepdim=True)


def _deviation(values: Tensor, mask: Tensor) -> Tensor:
    """Population deviation [] (float32) of the values [N, T] or [N, 1] inside the mask, 0 without any.

    It is taken about the mean. As the mean of the squares less the square of the mean, float32 gives 0 or about 5e-4
    for every spread below 5e-4, since importance weights lie near 1.
    """
    tokens = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / tokens
    return (((values - mean) * mask).square().sum() / tokens).sqrt().to(torch.float32)


def widest_float(like: Shaped[Tensor, " ..."]) -> torch.dtype:
    """The widest type in which the device of a tensor computes: MPS has no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _check(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    algorithm: Algorithm,
    weights: Tensor | None,
    entropies: Tensor | None,
) -> None:
    shape = logprobs.shape
    if len(shape) != 2:
        raise ValueError(f"logprobs must be [rollouts, response tokens], but is {list(shape)}")
    named = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "mask": mask, "weights": weights}
    named["entropies"] = entropies
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of logprobs, {list(shape)}, but is {list(tensor.shape)}")
    if advantages.shape not in ((shape[0],), (shape[0], 1)):
        raise ValueError(f"advantages must be [{shape[0]}] or [{shape[0]}, 1], but is {list(advantages.shape)}")
    if old_logprobs is None and algorithm.ratio_rule.compares:
        raise ValueError(
            f"old_logprobs must be given with algorithm.ratio = {algorithm.ratio!r}; only 'one' needs none"
        )
    if ref_logprobs is None and algorithm.kl_coefficient > 0:
        raise ValueError(
            f"ref_logprobs must be given with algorithm.kl_coefficient = {algorithm.kl_coefficient}; "
            "without a reference set it to 0"
        )
    if entropies is None and algorithm.entropy_coefficient > 0:
        raise ValueError(
            f"entropies must be given with algorithm.entropy_coefficient = {algorithm.entropy_coefficient}"
        )
    if (weights is None) == algorithm.weighs_tokens:
        raise ValueError(
            "weights must be given with algorithm.ratio = 'rollout' or correction.rollout_is, and only then "
            "(truncated_weights, roundoff.training.correction)"
        )
