"""Tasks: problems with rewards, packaged or your own (docs/tasks.md)."""

from roundoff.tasks.base import Message, Problem, RewardError, Task, TaskError
from roundoff.tasks.check import check_task
from roundoff.tasks.of_profile import make_task
from roundoff.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "Message", "Problem", "RewardError", "Task", "TaskError", "check_task", "load_task", "make_task"]
