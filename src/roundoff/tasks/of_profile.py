"""The task that a profile names."""

from __future__ import annotations

from roundoff.config import ConfigError, Profile
from roundoff.tasks.base import Task
from roundoff.tasks.registry import load_task


def make_task(profile: Profile) -> Task:
    """The task of a profile.

    Raises:
        ConfigError: if there is no task of that name, its settings are wrong, or the profile demands a chat template
            although the task has no conversations.
    """
    located = profile.task.located()
    try:
        task = load_task(located.name, located.settings)
    except ValueError as error:
        raise ConfigError(f"task {profile.task.name}: {error}") from error
    if profile.chat is True and any(not problem.messages for problem in (*task.train()[:1], *task.test()[:1])):
        raise ConfigError(f"profile.chat = true, but task {profile.task.name} asks no conversations: set it to auto")
    return task
