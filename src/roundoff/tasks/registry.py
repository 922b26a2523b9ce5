"""All tasks that a setting can name: packaged ones by their name, the user's own by the location of their class."""

from __future__ import annotations

from collections.abc import Mapping

from roundoff.tasks.arithmetic import arithmetic
from roundoff.tasks.base import Task
from roundoff.tasks.find import Factory, find_task
from roundoff.tasks.gsm8k import gsm8k
from roundoff.tasks.reasoning_gym import reasoning_gym

TASKS: dict[str, Factory] = {"arithmetic": arithmetic, "gsm8k": gsm8k, "reasoning-gym": reasoning_gym}
"""Task factories by name; each takes the task's own settings and raises TaskError if they are wrong."""


def load_task(name: str, settings: Mapping[str, object]) -> Task:
    """The task of this name, with these settings of its own.

    Args:
        name: an entry of `TASKS`, or a class of the user's own as `module:Class` or `file.py:Class`.
        settings: the task's own settings.

    Raises:
        TaskError: if there is no such task, or its settings are wrong.
        ConfigError: if an optional package is missing.
    """
    return find_task(name, settings, TASKS)
