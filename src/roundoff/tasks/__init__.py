"""Tasks: problems with rewards. To add one, write a module with a `Task` and enter its factory in `TASKS`."""

from collections.abc import Callable, Mapping

from roundoff.tasks.arithmetic import arithmetic
from roundoff.tasks.base import Problem, Task, TaskError

__all__ = ["TASKS", "Problem", "Task", "TaskError"]

TASKS: dict[str, Callable[[Mapping[str, object]], Task]] = {"arithmetic": arithmetic}
"""Task factories by name; each takes the task's own settings and raises TaskError where they are wrong."""
