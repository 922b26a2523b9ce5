"""Rewards for verl by roundoff's tasks: `reward.custom_reward_function.path=pkg://roundoff.plugins.verl.reward`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from roundoff.config import ConfigError
from roundoff.tasks import Problem, RewardError, Task, load_task
from roundoff.tasks.score import checked_reward

logger = logging.getLogger(__name__)

BY_ANSWER = ("arithmetic", "gsm8k")
"""Tasks whose reward depends on nothing of a problem but its answer, so that files without ids will do."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    task: str = "",
    settings: str = "{}",
) -> float:
    """1.0 where the response ends in the right answer, else 0.0, as the task judges it.

    Where the reward cannot be computed, it is 0.0, and a warning says why: verl has no place to count it.

    `task` and `settings` (JSON) come from `reward.custom_reward_function.reward_kwargs`; `extra_info["id"]` is the
    problem's, as `roundoff verl-config --write-data` writes it; `data_source` is verl's and plays no part.

    Raises:
        ConfigError: if the task has no such problem.
    """
    judge = _judge(task, settings)
    problem = judge.problem(str(ground_truth), (extra_info or {}).get("id"))
    try:
        return checked_reward(judge.task, problem, solution_str)
    except RewardError as error:
        logger.warning("reward error at problem %s, counted as 0: %s", problem.id, error)
        return 0.0


@dataclass(frozen=True)
class _Judge:
    """A task and its problems."""

    task: Task
    by_id: Mapping[str, Problem]
    by_answer: Mapping[str, Problem]

    def problem(self, answer: str, identity: str | None) -> Problem:
        """The problem of an id, or, where answers are enough, one with this answer."""
        found = self.by_id.get(identity) if identity is not None else None
        if identity is None and self.task.name in BY_ANSWER:
            found = self.by_answer.get(_plain(answer))
        if found is None or _plain(found.answer) != _plain(answer):
            raise ConfigError(
                f"task {self.task.name!r} has no problem with extra_info.id {identity!r} and the answer "
                f"{answer[:40]!r}: write verl's files by `roundoff verl-config --write-data`, with the same task"
            )
        return found


def _plain(answer: str) -> str:
    return answer.replace(",", "")


@cache
def _judge(name: str, settings: str) -> _Judge:
    task = load_task(name, json.loads(settings))
    problems = (*task.train(), *task.test())
    return _Judge(task, {p.id: p for p in problems}, {_plain(p.answer): p for p in problems})
