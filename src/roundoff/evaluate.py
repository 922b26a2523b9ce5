"""The only scorer: greedy accuracy of a model on a test set, with the hardware on (deployed) and off (clean).

The noise of an evaluation is keyed by the run's seed and the number of the draw, not by the step: two steps, or two
arms with one seed, meet the same draws, so that their difference is that of the models. Training noise has other keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.aqn import is_aqn_active
from roundoff.hardware.install import hardware_off, installed
from roundoff.numerics.rng import Key
from roundoff.rollouts import Rollouts
from roundoff.run_dir import Evaluation, Outcome
from roundoff.sampler import sample
from roundoff.tasks import Problem, Task


@dataclass(frozen=True, slots=True)
class Scored:
    """Rewards of rollouts, and how many of them could not be computed."""

    rewards: tuple[float, ...]
    errors: int
    """Rollouts whose reward raised or was not finite; their reward is 0."""


def score_responses(task: Task, problems: Sequence[Problem], responses: Sequence[str]) -> Scored:
    """Rewards of `responses` to `problems`, pair by pair; a failed reward is counted and is 0, never raised."""
    rewards, errors = [], 0
    for problem, response in zip(problems, responses, strict=True):
        try:
            reward = float(task.reward(problem, response))
        except Exception:  # a task is the user's code: whatever it raises is one bad rollout, not the end of the run
            reward = math.nan
        errors += not math.isfinite(reward)
        rewards.append(reward if math.isfinite(reward) else 0.0)
    return Scored(tuple(rewards), errors)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    key: Key,
    max_new_tokens: int,
    noise_draws: int = 1,
    noisy: bool = True,
    step: int = 0,
) -> Evaluation:
    """Outcome of every test problem under greedy decoding, deployed and clean.

    Args:
        model: with its hardware installed, or plain (both scores are then the same pass).
        tokenizer: of the model.
        task: whose test problems are answered.
        key: of the run; the draws are folded from it.
        max_new_tokens: length limit of a response (tokens).
        noise_draws: deployed passes over the test set, each under its own noise.
        noisy: whether passes differ at all; without noise one pass is all there is.
        step: training steps taken so far.

    Raises:
        RuntimeError: if AQN is in force: its noise belongs to rollouts alone.
    """
    if is_aqn_active(model):
        raise RuntimeError("evaluate was called inside aqn_noise: a score must never carry the noise of a remedy")
    problems = task.test()

    def greedy(draw: int) -> Rollouts:
        return sample(
            model,
            tokenizer,
            [problem.prompt for problem in problems],
            group_size=1,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            key=key.fold("evaluation", draw),
        )

    deployed = [greedy(draw) for draw in range(noise_draws if noisy else 1)]
    clean = deployed[0]
    if installed(model) is not None:
        with hardware_off(model):
            clean = greedy(0)
    solved = [score_responses(task, problems, rollouts.texts).rewards for rollouts in deployed]
    solved_clean = score_responses(task, problems, clean.texts).rewards
    outcomes = tuple(
        Outcome(
            id=problem.id,
            prompt=problem.prompt,
            answer=problem.answer,
            deployed=tuple(int(draw[i] == 1.0) for draw in solved),
            clean=int(solved_clean[i] == 1.0),
            response=deployed[0].texts[i],
            clean_response=clean.texts[i],
            truncated=bool(deployed[0].truncated[i]),
        )
        for i, problem in enumerate(problems)
    )
    return Evaluation(step, outcomes)
