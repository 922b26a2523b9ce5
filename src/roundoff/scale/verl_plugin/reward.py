"""Rewards for verl by roundoff's tasks: `reward.custom_reward_function.path=pkg://roundoff.scale.verl_plugin.reward`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from roundoff.tasks import load_task
from roundoff.tasks.base import Problem, Task


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    task: str = "",
    settings: str = "{}",
) -> float:
    """1.0 where the response ends in the right answer, else 0.0, as the task judges it.

    `task` and `settings` (JSON) come from `reward.custom_reward_function.reward_kwargs`; `data_source` and
    `extra_info` are verl's and play no part.
    """
    return _task(task, settings).reward(Problem(id="", prompt="", answer=str(ground_truth)), solution_str)


@cache
def _task(name: str, settings: str) -> Task:
    return load_task(name, json.loads(settings))
