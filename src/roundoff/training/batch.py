"""One training batch: prompts are drawn, rollouts sampled and rewarded, and groups chosen.

Axes: P `prompts`, G rollouts of each (its `group`), N = P*G `rollouts`.

A rollout that could not be computed (`nonfinite`) has reward 0 and does not belong to its group: the advantages of the
others are those of a group without it. Otherwise they would rise merely because they were computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.config import Algorithm, Training
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import Ranks
from roundoff.runs.health import flaw_of
from roundoff.sampling.rollouts import Rollouts, concatenate
from roundoff.tasks import Problem, Task
from roundoff.tasks.score import score_responses
from roundoff.training.advantage import group_advantages, mixed_groups, overlong_penalty

Sampler = Callable[[Sequence[Problem], int], Rollouts]
"""A function that samples the rollouts of problems, given the id of the first rollout within the step."""


@dataclass(frozen=True)
class PromptStream:
    """Training problems in an endless order: each pass is a new permutation of all of them, which the key decides."""

    problems: Sequence[Problem]
    key: Key

    def take(self, start: int, count: int) -> list[Problem]:
        """Take `count` problems from position `start` of the stream on."""
        size = len(self.problems)
        found: list[Problem] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), size)
            order = np.random.Generator(np.random.Philox(key=self.key.fold("order", epoch).value)).permutation(size)
            found += [self.problems[i] for i in order[offset : offset + count - len(found)]]
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Rollouts to train on, and statistics of all rollouts that were sampled."""

    rollouts: Rollouts
    advantages: Float[Tensor, " rollouts"]
    """Zero for a group of equal rewards; in host memory, like the rollouts."""
    reward: float
    """Mean reward over all rollouts sampled, penalties included (reward units)."""
    accuracy: float
    """Mean of the task's own reward over all rollouts sampled (fraction)."""
    mixed_groups: float
    """Share of the groups sampled that hold two different rewards (fraction)."""
    prompts: int
    """Number of prompts sampled."""
    reward_errors: int
    """Number of rollouts whose reward raised or was not finite."""
    response_tokens: float
    """Mean length of a response, over all rollouts sampled (tokens)."""
    truncated: float
    """Share of the rollouts sampled that were cut at the length limit (fraction)."""
    empty: float
    """Share of the rollouts sampled that ended without a text (fraction)."""
    sampled: int
    """Number of rollouts sampled."""
    nonfinite: int
    """Number of rollouts that ended because the logits were not finite; none of them is trained on."""

    @property
    def teaches(self) -> bool:
        """Whether any rollout that can be trained on has an advantage other than zero."""
        return bool(((self.advantages != 0) & ~self.rollouts.nonfinite).any())


def collect(
    stream: PromptStream,
    position: int,
    sampler: Sampler,
    task: Task,
    algorithm: Algorithm,
    training: Training,
    ranks: Ranks,
) -> Batch:
    """Collect a batch of `prompts_per_step` groups from `position` of the stream on.

    With dynamic sampling, `oversampling` times as many prompts are drawn at a time, and groups of equal reward are
    dropped. More prompts are drawn until the batch is full or `max_sampling_batches` have been drawn; after that the
    batch holds the groups there are (arXiv:2503.14476, section 3.2). A batch without a usable group is returned as it
    is, and teaches nothing. Every rank samples and rewards its share of the prompts, and returns the whole batch.
    """
    G, wanted = algorithm.group_size, training.prompts_per_step
    drawn = wanted * algorithm.oversampling
    seen: list[tuple[Rollouts, Tensor, Tensor]] = []  # rollouts, rewards [P, G], accuracy [P, G]
    usable, errors = 0, 0
    for number in range(algorithm.max_sampling_batches if algorithm.dynamic_sampling else 1):
        problems = stream.take(position + number * drawn, drawn)
        share = ranks.share(drawn)
        sampled = sampler(problems[share], (number * drawn + share.start) * G)
        scored = score_responses(task, [p for p in problems[share] for _ in range(G)], sampled.texts)
        parts = ranks.gather((sampled, scored))
        rollouts = concatenate([r for r, _ in parts]) if len(parts) > 1 else sampled
        errors += sum(s.errors for _, s in parts)
        finite = ~rollouts.nonfinite.view(drawn, G)
        earned = torch.tensor([r for _, s in parts for r in s.rewards], dtype=torch.float32).view(drawn, G)
        accuracy = torch.where(finite, earned, 0.0)
        lengths = rollouts.lengths.view(drawn, G)
        rewards = accuracy + overlong_penalty(lengths, training.max_new_tokens, algorithm)
        seen.append((rollouts, rewards, accuracy))
        usable += int(_mixed(rewards, finite).sum())
        if usable >= wanted:
            break
    rewards = torch.cat([r for _, r, _ in seen])
    everything = seen[0][0] if len(seen) == 1 else concatenate([r for r, _, _ in seen])
    finite = ~everything.nonfinite.view(-1, G)
    mixed = _mixed(rewards, finite)
    chosen = torch.arange(len(rewards))
    if algorithm.dynamic_sampling and usable:
        chosen = chosen[mixed][:wanted]
    elif algorithm.dynamic_sampling:
        chosen = chosen[:wanted]
    members = (chosen[:, None] * G + torch.arange(G)).flatten()
    return Batch(
        rollouts=everything if len(members) == len(everything.texts) else everything.select(members),
        advantages=_advantages(rewards[chosen], finite[chosen], algorithm).flatten(),
        reward=float(rewards.mean()),
        accuracy=float(torch.cat([a for _, _, a in seen]).mean()),
        mixed_groups=float(mixed.float().mean()),
        prompts=len(rewards),
        reward_errors=errors,
        response_tokens=float(everything.lengths.float().mean()),
        truncated=float(everything.truncated.float().mean()),
        empty=_empty(everything) / len(everything),
        sampled=len(everything),
        nonfinite=int(everything.nonfinite.sum()),
    )


def _mixed(rewards: Tensor, finite: Tensor) -> Tensor:
    """Whether each group [P] of rewards [P, G] holds two different ones among its `finite` rollouts [P, G]."""
    if finite.all():
        return mixed_groups(rewards)
    highest = torch.where(finite, rewards, -torch.inf).amax(dim=1)
    return highest > torch.where(finite, rewards, torch.inf).amin(dim=1)


def _advantages(rewards: Tensor, finite: Tensor, algorithm: Algorithm) -> Tensor:
    """Advantages [P, G] of rewards [P, G] among the `finite` rollouts [P, G] of each group; 0 for the others."""
    advantages = group_advantages(rewards, algorithm)
    for group in (~finite).any(dim=1).nonzero()[:, 0]:
        members = finite[group]
        advantages[group] = 0.0
        if members.sum() > 1:
            advantages[group, members] = group_advantages(rewards[group, members][None], algorithm)[0]
    return advantages


def _empty(rollouts: Rollouts) -> int:
    """The number of rollouts that ended without a text."""
    flags = zip(rollouts.texts, rollouts.nonfinite.tolist(), rollouts.truncated.tolist(), strict=True)
    flaws = [flaw_of(text, nonfinite=bad, reward_error=False, truncated=cut) for text, bad, cut in flags]
    return flaws.count("empty")
