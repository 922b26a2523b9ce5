"""The only scorer: accuracy of a model on a test set, on the hardware of evaluation (deployed) and without (clean).

Here: `evaluate`, which decodes greedily and gives the score of training curves and of the report, and
`evaluate_samples`, which draws several responses to each problem for pass@k, the probability that at least one of k is
right. Not here: what an evaluation holds (`roundoff.runs.outcomes`) and the options of `roundoff eval`
(`roundoff.actions.evaluate`).

Doors: `evaluate`, `evaluate_samples`, `SampledOutcome` and `pass_at_k`.

The noise of an evaluation is keyed by the run's seed and the number of the draw, not by the step. Two steps, or two
arms with one seed, therefore meet the same draws, and their difference is that of the models. Training noise has other
keys.

**Responses that could not be computed.** A response whose logits were not finite solves nothing: that is the true
result of the chip, and it is counted beside the score (`roundoff.runs.health`). If no response could be computed, there
is an error instead of a score. If even one response could not be computed with the hardware off, there is an error,
too, because the model itself is broken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.aqn.noise import is_aqn_active
from roundoff.config import ConfigError
from roundoff.hardware import hardware_off, hardware_phase, installed
from roundoff.models.prompts import text
from roundoff.models.weights import few
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.health import FailedRewardsError, NonFiniteOutputError, Tally, flaw_of
from roundoff.runs.outcomes import Evaluation, Outcome
from roundoff.sampling.diagnosis import first_nonfinite
from roundoff.sampling.sampler import sample
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
        model: with its hardware installed, or plain; without hardware, one pass gives both scores.
        tokenizer: of the model.
        task: whose test problems are answered.
        key: of the run; the keys of the draws are folded from it.
        max_new_tokens: length limit of a response, in tokens.
        noise_draws: deployed passes over the test set, each under noise of its own.
        noisy: whether deployed passes differ at all; if not, there is only one.
        step: training steps taken so far.
        ranks: processes that divide the problems among them; each returns the complete evaluation.

    Raises:
        RuntimeError: if the model is inside `aqn_noise`, whose noise belongs to rollouts only.
        ConfigError: if two test problems have the same id.
        NonFiniteOutputError: if no response could be computed with the hardware on, or not all with it off.
        FailedRewardsError: if the reward of every response failed.
    """
    problems = _problems(model, task)

    def greedy(draw: int) -> _Answers:
        return _answers(model, tokenizer, task, problems, key.fold("evaluation", draw), max_new_tokens, ranks=ranks)

    with hardware_phase(model, "evaluation"):
        deployed = [greedy(draw) for draw in range(noise_draws if noisy else 1)]
    clean = deployed[0]
    if installed(model) is not None:
        with hardware_off(model):
            clean = greedy(0)
    _check_scored(task, deployed, clean, plain=installed(model) is None)
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
            flaws=tuple(answers.flaws[i] for answers in deployed),
            clean_flaw=clean.flaws[i],
        )
        for i, problem in enumerate(problems)
    )
    return Evaluation(step, outcomes, next(filter(None, (answers.nonfinite_at for answers in deployed)), ""))


@dataclass(frozen=True, slots=True)
class SampledOutcome:
    """The sampled responses to one test problem, scored."""

    id: str
    """Id of the problem."""
    prompt: str
    """Text that the model read."""
    answer: str
    """Correct answer."""
    deployed: tuple[int, ...]
    """For each sample with the hardware on, under noise of its own: 1 if it is solved, else 0."""
    clean: tuple[int, ...]
    """For each sample with the hardware off: 1 if it is solved, else 0."""
    flaws: tuple[str, ...] = ()
    """Flaw of each sample with the hardware on (`roundoff.runs.health`); empty if it has none."""
    clean_flaws: tuple[str, ...] = ()
    """Flaw of each sample with the hardware off; empty if it has none."""


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement, is a solved one.

    This is the unbiased estimator `1 - C(n - c, k) / C(n, k)` of pass@k (Chen et al. 2021, arXiv:2107.03374,
    equation 1); for k = 1 it is the mean. The alternative `1 - (1 - c/n)^k`, which is also in use, is biased downwards.

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

    Deployed and clean responses are drawn with the same uniform numbers, so that any difference is due to the hardware.

    Raises:
        RuntimeError, ConfigError, NonFiniteOutputError, FailedRewardsError: as in `evaluate`.
    """
    problems, own = _problems(model, task), key.fold("evaluation", "samples")

    def drawn() -> _Answers:
        return _answers(model, tokenizer, task, problems, own, max_new_tokens, samples=samples, temperature=temperature)

    with hardware_phase(model, "evaluation"):
        deployed = clean = drawn()
    if installed(model) is not None:
        with hardware_off(model):
            clean = drawn()
    _check_scored(task, [deployed], clean, plain=installed(model) is None)
    return tuple(
        SampledOutcome(
            id=problem.id,
            prompt=text(tokenizer, problem),
            answer=problem.answer,
            deployed=deployed.solved[mine],
            clean=clean.solved[mine],
            flaws=deployed.flaws[mine],
            clean_flaws=clean.flaws[mine],
        )
        for problem, mine in ((p, slice(i * samples, (i + 1) * samples)) for i, p in enumerate(problems))
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """Responses to the test problems; the samples of one problem are adjacent."""

    texts: list[str]
    solved: tuple[int, ...]
    truncated: list[bool]
    flaws: tuple[str, ...]
    nonfinite_at: str
    """The first module whose output was not finite, in words; empty if all were."""


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
    parts = ranks.gather(
        _answered(model, tokenizer, task, mine, share.start, key, max_new_tokens, samples, temperature)
    )
    return parts[0] if len(parts) == 1 else _joined(parts)


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    mine: Sequence[Problem],
    first: int,
    key: Key,
    max_new_tokens: int,
    samples: int,
    temperature: float,
) -> _Answers:
    """This rank's responses to its own problems; `first` is the number of the first of them."""
    if not mine:  # more ranks than problems
        return _Answers([], (), [], (), "")
    rollouts = sample(
        model,
        tokenizer,
        mine,
        group_size=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
        rollout_ids=range(first * samples, (first + len(mine)) * samples),
    )
    scored = score_responses(task, [p for p in mine for _ in range(samples)], rollouts.texts)
    truncated, nonfinite = rollouts.truncated.tolist(), rollouts.nonfinite.tolist()
    flaws = tuple(
        flaw_of(response, nonfinite=nonfinite[i], reward_error=scored.failed[i], truncated=truncated[i])
        for i, response in enumerate(rollouts.texts)
    )
    solved = tuple(int(r == 1.0 and not bad) for r, bad in zip(scored.rewards, nonfinite, strict=True))
    return _Answers(rollouts.texts, solved, truncated, flaws, first_nonfinite(model, rollouts))


def _joined(parts: Sequence[_Answers]) -> _Answers:
    """The answers of all ranks, in the order of the problems."""
    return _Answers(
        [text for part in parts for text in part.texts],
        tuple(solved for part in parts for solved in part.solved),
        [truncated for part in parts for truncated in part.truncated],
        tuple(flaw for part in parts for flaw in part.flaws),
        next(filter(None, (part.nonfinite_at for part in parts)), ""),
    )


def _check_scored(task: Task, deployed: Sequence[_Answers], clean: _Answers, *, plain: bool) -> None:
    """Refuse a score if too little was computed. `plain` says that there is no hardware: both are the same answers."""
    tally = Tally.of(clean.flaws)
    if tally.nonfinite:
        how = "in plain arithmetic" if plain else "with the hardware off"
        raise NonFiniteOutputError(
            f"{tally.failures()[0]}. That is so {how}, first in {clean.nonfinite_at}: the model itself is broken and "
            "has no score. Check its weights for NaN and Inf, and the learning rate if it was trained"
        )
    if tally.reward_error == tally.responses:
        raise _all_rewards_failed(task, tally)
    answers = [flaw for draw in deployed for flaw in draw.flaws]
    tally = Tally.of(answers)
    if tally.nonfinite == tally.responses:
        raise NonFiniteOutputError(
            f"none of the {tally.responses:,} responses could be computed with the hardware on: the logits were not "
            f"finite, first in {deployed[0].nonfinite_at}; with the hardware off all were. There is no deployed score: "
            "take a format of a wider range, or keep that layer in high precision (hardware.precision.keep)"
        )
    if tally.nonfinite + tally.reward_error == tally.responses:
        raise _all_rewards_failed(task, tally)


def _all_rewards_failed(task: Task, tally: Tally) -> FailedRewardsError:
    return FailedRewardsError(
        f"task {task.name!r}: the reward failed for every one of {tally.responses:,} responses (it raised, or gave no "
        "finite number), so there is no score: try task.reward on one of them"
    )


def _problems(model: PreTrainedModel, task: Task) -> Sequence[Problem]:
    """The test problems, if the model can be scored on them."""
    if is_aqn_active(model):
        raise RuntimeError("the model is inside aqn_noise: a score must never carry the noise of a remedy")
    problems = task.test()
    repeated = sorted(name for name, count in Counter(problem.id for problem in problems).items() if count > 1)
    if repeated:
        raise ConfigError(
            f"task {task.name!r} has test problems that share an id ({few(repeated)}): scores are paired by id, so "
            "each id must be unique"
        )
    return problems
