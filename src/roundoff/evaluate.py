"""The only scorer: accuracy of a model on a test set, with the hardware on (deployed) and off (clean).

`evaluate` decodes greedily: the score of training curves and of the report. `evaluate_samples` draws several responses
to each problem and gives pass@k, the probability that at least one of k is right.

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
from roundoff.parallel import ALONE, Ranks
from roundoff.prompts import text
from roundoff.run_dir import Evaluation, Outcome
from roundoff.sampler import sample
from roundoff.tasks import Problem, Task
from roundoff.tasks.score import score_responses


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
    ranks: Ranks = ALONE,
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
        ranks: processes that share the problems out among them; every one returns the whole evaluation.

    Raises:
        RuntimeError: if AQN is in force: its noise belongs to rollouts alone.
    """
    _check_no_aqn(model)
    problems = task.test()

    def greedy(draw: int) -> _Answers:
        return _answers(model, tokenizer, task, problems, key.fold("evaluation", draw), max_new_tokens, ranks=ranks)

    deployed = [greedy(draw) for draw in range(noise_draws if noisy else 1)]
    clean = deployed[0]
    if installed(model) is not None:
        with hardware_off(model):
            clean = greedy(0)
    outcomes = tuple(
        Outcome(
            id=problem.id,
            prompt=text(tokenizer, problem),
            answer=problem.answer,
            deployed=tuple(answers.solved[i] for answers in deployed),
            clean=clean.solved[i],
            response=deployed[0].texts[i],
            clean_response=clean.texts[i],
            truncated=deployed[0].truncated[i],
        )
        for i, problem in enumerate(problems)
    )
    return Evaluation(step, outcomes)


@dataclass(frozen=True, slots=True)
class SampledOutcome:
    """What became of the sampled responses to one test problem."""

    id: str
    prompt: str
    answer: str
    deployed: tuple[int, ...]
    """1 where solved with the hardware on, one entry a sample, each under noise of its own."""
    clean: tuple[int, ...]
    """1 where solved with the hardware off, one entry a sample."""


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that at least one of k of the samples, drawn without replacement, is among the solved ones.

    The unbiased estimator `1 - C(n - c, k) / C(n, k)` of pass@k (Chen et al. 2021, arXiv:2107.03374, equation 1);
    k = 1 is the mean. `1 - (1 - c/n)^k`, which one meets as well, is biased downwards.

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= solved <= samples.
    """
    if not (1 <= k <= samples and 0 <= solved <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= samples and solved <= samples, but is {k=}, {samples=}, {solved=}")
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    key: Key,
    max_new_tokens: int,
    samples: int,
    temperature: float,
) -> tuple[SampledOutcome, ...]:
    """Outcomes of `samples` responses to every test problem at a temperature, deployed and clean.

    Deployed and clean responses are drawn by the same uniform numbers: where they differ, the hardware did it.

    Raises:
        RuntimeError: if AQN is in force.
    """
    _check_no_aqn(model)
    problems = task.test()

    def drawn() -> list[tuple[int, ...]]:
        own = key.fold("evaluation", "samples")
        found = _answers(
            model, tokenizer, task, problems, own, max_new_tokens, samples=samples, temperature=temperature
        ).solved
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    deployed = clean = drawn()
    if installed(model) is not None:
        with hardware_off(model):
            clean = drawn()
    return tuple(
        SampledOutcome(problem.id, text(tokenizer, problem), problem.answer, with_hardware, without)
        for problem, with_hardware, without in zip(problems, deployed, clean, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """Responses to the test problems, `samples` to each, next to each other."""

    texts: list[str]
    solved: tuple[int, ...]
    truncated: list[bool]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    key: Key,
    max_new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    ranks: Ranks = ALONE,
) -> _Answers:
    share = ranks.share(len(problems))
    mine = problems[share]
    rollouts = sample(
        model,
        tokenizer,
        mine,
        group_size=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
        rollout_ids=range(share.start * samples, share.stop * samples),
    )
    rewards = score_responses(task, [p for p in mine for _ in range(samples)], rollouts.texts).rewards
    solved = tuple(int(r == 1.0) for r in rewards)
    parts = ranks.gather(_Answers(rollouts.texts, solved, rollouts.truncated.tolist()))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[_Answers]) -> _Answers:
    """The answers of all ranks, in the order of the problems."""
    return _Answers(
        [text for part in parts for text in part.texts],
        tuple(solved for part in parts for solved in part.solved),
        [truncated for part in parts for truncated in part.truncated],
    )


def _check_no_aqn(model: PreTrainedModel) -> None:
    if is_aqn_active(model):
        raise RuntimeError("the model is inside aqn_noise: a score must never carry the noise of a remedy")
