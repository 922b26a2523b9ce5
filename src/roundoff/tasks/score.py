"""Computes the rewards of responses: what a task may return, what counts as an error, and how long it may take.

A reward is a finite number of at most 1.0; it may come as a bool, a NumPy scalar or a tensor of one element. Only 1.0
counts as solved. Lower rewards, including penalties below 0, are trained on as they are. Everything else (NaN, an
infinity, a number above 1, None, text, any exception) is a reward error: the reward is 0, and the error is counted.

A task's class may set `reward_seconds`, the time that one response may take (60 by default, None for no limit). If a
reward takes longer, the run ends (`tasks.watchdog`), because code in this process cannot be stopped without harm.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from roundoff.tasks.base import Problem, RewardError, Task
from roundoff.tasks.watchdog import StopRewardError, Watchdog

REWARD_SECONDS = 60.0
"""Wall-clock limit for one response of a task that sets no `reward_seconds` (s)."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Rewards of rollouts, and which of them could not be computed."""

    rewards: tuple[float, ...]
    errors: int
    """Number of rollouts whose reward could not be computed or is not a valid reward; their reward is 0."""
    failed: tuple[bool, ...] = field(default=(), compare=False)
    """For each rollout, whether its reward failed in this way."""


def score_responses(task: Task, problems: Sequence[Problem], responses: Sequence[str]) -> Scored:
    """Rewards of `responses` to `problems`, pair by pair; a reward that fails is counted and is 0, and never raises.

    Raises:
        RewardTimeoutError: if one response takes longer than the task's `reward_seconds`.
    """
    compute = _reward_of(task)
    rewards: list[float] = []
    failed: list[bool] = []
    watchdog, process = _watchdog(task), os.getpid()
    with watchdog or nullcontext():
        for problem, response in zip(problems, responses, strict=True):
            if watchdog is not None:
                watchdog.begin(problem.id, response)
            try:
                reward = compute(problem, response)
                if type(reward) is not float:
                    reward = _number(reward)
            except BaseException as error:
                _end_copy(process, error)
                if isinstance(error, KeyboardInterrupt | StopRewardError):
                    raise
                reward = math.nan  # a task is the user's code: its failure costs one rollout, not the run
            _end_copy(process, None)
            failed.append(not -math.inf < reward <= 1.0)
            rewards.append(0.0 if failed[-1] else reward)
    return Scored(tuple(rewards), sum(failed), tuple(failed))


def checked_reward(task: Task, problem: Problem, response: str) -> float:
    """The reward of one response.

    Raises:
        RewardError: if it could not be computed, or is not a valid reward; the message says why.
    """
    process = os.getpid()
    try:
        reward = _reward_of(task)(problem, response)
        _end_copy(process, None)
        return as_reward(reward)
    except RewardError:
        raise
    except BaseException as error:
        _end_copy(process, error)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(f"the reward raised {type(error).__name__}: {error}") from error


def _end_copy(process: int, error: BaseException | None) -> None:
    """End this process if it is a copy of `process` that a reward has forked; otherwise it would continue the run.

    Such a copy usually ends by `sys.exit`, which does not end it here, because the exception is caught.
    """
    if os.getpid() == process:
        return
    code = error.code if isinstance(error, SystemExit) else 0 if error is None else 1
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def as_reward(value: Any) -> float:
    """The value that a task or a scorer returned, as a number.

    Raises:
        RewardError: if it is not a number, or not a valid reward; the message says why.
    """
    reward = _number(value)
    if not -math.inf < reward <= 1.0:
        raise RewardError(f"a reward must be a finite number of at most 1.0, but is {reward!r}")
    return reward


def _reward_of(task: Task) -> Callable[[Problem, str], Any]:
    """The task's `reward_or_error`, which raises instead of hiding an error, if it has one; else its `reward`."""
    compute: Callable[[Problem, str], Any] = getattr(task, "reward_or_error", task.reward)
    return compute


def _number(reward: Any) -> float:
    if isinstance(reward, str | bytes | bytearray):
        raise RewardError(f"a reward must be a number, but is the text {reward[:40]!r}")
    try:
        return float(reward)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"a reward must be a number, but is {type(reward).__name__}: {error}") from error


def _watchdog(task: Task) -> Watchdog | None:
    """A watchdog with the task's limit of time, or None if it sets no limit."""
    seconds = getattr(task, "reward_seconds", REWARD_SECONDS)
    if seconds is None:
        return None
    return Watchdog(task.name, float(seconds))
