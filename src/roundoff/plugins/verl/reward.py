"""Rewards of roundoff's tasks for verl: `reward.custom_reward_function.path=pkg://roundoff.plugins.verl.reward`."""

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
"""Tasks whose reward depends on a problem's answer alone, so that data without ids can be used."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    task: str = "",
    settings: str = "{}",
) -> float:
    """The task's reward of a response: 1.0 if it ends in the right answer, else 0.0.

    A reward that cannot be computed counts as 0.0, and a warning says why, because verl has no place to count it.

    Args:
        data_source: verl's name of the data, which is ignored.
        solution_str: the response.
        ground_truth: the answer.
        extra_info: under `id` the problem's id, as `roundoff verl-config --write-data` writes it.
        task: name of the task, from `reward.custom_reward_function.reward_kwargs`.
        settings: its settings (JSON), from there too.

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
    """A task, and its problems by id and by answer."""

    task: Task
    by_id: Mapping[str, Problem]
    by_answer: Mapping[str, Problem]

    def problem(self, answer: str, identity: str | None) -> Problem:
        """The problem with this id; without an id, one with this answer if the task needs no more."""
        match = self.by_id.get(identity) if identity is not None else None
        if identity is None and self.task.name in BY_ANSWER:
            match = self.by_answer.get(_plain(answer))
        if match is None or _plain(match.answer) != _plain(answer):
            raise ConfigError(
                f"task {self.task.name!r} has no problem with extra_info.id {identity!r} and the answer "
                f"{answer[:40]!r}: write verl's files by `roundoff verl-config --write-data`, with the same task"
            )
        return match


def _plain(answer: str) -> str:
    return answer.replace(",", "")


@cache
def _judge(name: str, settings: str) -> _Judge:
    task = load_task(name, json.loads(settings))
    problems = (*task.train(), *task.test())
    return _Judge(task, {p.id: p for p in problems}, {_plain(p.answer): p for p in problems})
