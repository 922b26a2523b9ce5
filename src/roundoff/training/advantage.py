"""Advantages of rollouts from the rewards of their group, and the length penalty of DAPO.

Axes: P `prompts`, G rollouts of each prompt (its `group`).

An advantage is the reward minus the mean of its group (GRPO, arXiv:2402.03300, section 4.1.2), by default divided by
the standard deviation of the group. Worked group, rewards 1, 0, 0, 0: mean 0.25, standard deviation
`sqrt((0.75**2 + 3*0.25**2)/3) = 0.5`, advantages 1.5, -0.5, -0.5, -0.5.

The standard deviation is the unbiased one (G - 1 in the denominator), as in verl (`torch.std` in
`compute_grpo_outcome_advantage`) and in trl 1.16 (`nanstd` with Bessel's correction). The two differ in what they add
to it, 1e-6 and 1e-4; here it is verl's. The paper does not say which standard deviation it means.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from roundoff.config import Algorithm

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group (reward units). It is verl's default; trl 1.16 adds 1e-4."""


def group_advantages(rewards: Shaped[Tensor, "prompts group"], algorithm: Algorithm) -> Float[Tensor, "prompts group"]:
    """Advantages of rewards; they are exactly 0 throughout a group of equal rewards.

    Raises:
        ValueError: if `rewards` is not [P, G] with G of at least 2, or holds a value that is not finite.
    """
    rewards = _checked(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if algorithm.normalize_std:
        centred = centred / (rewards.std(dim=1, correction=1, keepdim=True) + STD_EPSILON)
    # The mean of equal numbers may differ from them in the last bit: 0.1, 0.1, 0.1 must not give noise over epsilon.
    return torch.where(mixed_groups(rewards)[:, None], centred, 0.0)


def mixed_groups(rewards: Shaped[Tensor, "prompts group"]) -> Bool[Tensor, " prompts"]:
    """Whether each group holds two different rewards, without which it teaches nothing.

    Dynamic sampling keeps these groups alone. Rewards are taken with their penalties; DAPO (arXiv:2503.14476, equation
    11) keeps the groups in which some responses are right and some are not.

    Raises:
        ValueError: as `group_advantages`.
    """
    rewards = _checked(rewards)
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def overlong_penalty(
    lengths: Shaped[Tensor, "*shape"], max_new_tokens: int, algorithm: Algorithm
) -> Float[Tensor, "*shape"]:
    """The amount to add to the reward of responses of `lengths` tokens: float32 in [-factor, 0].

    Soft overlong punishment (DAPO, arXiv:2503.14476, equation 13) with `buffer = overlong_buffer * max_new_tokens`:
    0 up to `max_new_tokens - buffer` tokens, then falling in a straight line to `-overlong_factor` at `max_new_tokens`.
    With 1,024 tokens, a buffer of 256 and a factor of 0.5: 768 tokens 0, 896 tokens -0.25, 1,024 tokens -0.5.
    """
    buffer = algorithm.overlong_buffer * max_new_tokens
    if buffer == 0 or algorithm.overlong_factor == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    excess = (lengths.to(torch.float32) - (max_new_tokens - buffer)) / buffer
    return torch.where(excess > 0, -algorithm.overlong_factor * excess.clamp(max=1.0), 0.0)


def _checked(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [prompts, group] with at least 2 rollouts in a group, but is {list(rewards.shape)}: "
            "set algorithm.group_size to 2 or more"
        )
    finite = rewards.isfinite()
    if not finite.all():
        prompt, rollout = (int(i) for i in torch.nonzero(~finite)[0])
        raise ValueError(
            f"rewards must be finite, but rollout {rollout} of prompt {prompt} has {rewards[prompt, rollout].item()} "
            f"({int((~finite).sum())} such in all): give a bad rollout reward 0 and record it"
        )
    return rewards if rewards.is_floating_point() else rewards.to(torch.float32)
