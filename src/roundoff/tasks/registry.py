"""Every task that a setting can name: the packaged ones by name, and your own by the place of their class."""

from __future__ import annotations

from collections.abc import Mapping

from roundoff.tasks.arithmetic import arithmetic
from roundoff.tasks.base import Task
from roundoff.tasks.find import Factory, find_task
from roundoff.tasks.gsm8k import gsm8k
from roundoff.tasks.reasoning_gym import reasoning_gym

TASKS: dict[str, Factory] = {"arithmetic": arithmetic, "gsm8k": gsm8k, "reasoning-gym": reasoning_gym}
"""Task factories by name; each takes the task's own settings and raises TaskError where they are wrong."""


def load_task(name: str, settings: Mapping[str, object]) -> Task:
    """The task of an entry of `TASKS`, or of a class of your own: `module:Class` or `file.py:Class`.

    Raises:
        TaskError: if there is none of that name, or its settings are wrong.
        ConfigError: if an optional package is missing.
    """
    return find_task(name, settings, TASKS)
