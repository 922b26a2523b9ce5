"""Tasks: problems with rewards, both packaged ones and the user's own (docs/tasks.md).

A task computes a reward from text alone. Sampling the responses is in `roundoff.sampling`, and the only code that turns
rewards into a score is `roundoff.evaluation`. Answers are read by `answers` and its helpers, and a reward that hangs is
stopped by `watchdog`.

Doors: the names below (`make_task`, `load_task`, `check_task`, `TASKS` and the types of `base`),
`score.score_responses` and `score.checked_reward`, and, for the embedded model, `arithmetic`.
"""

from roundoff.tasks.base import Message, Problem, RewardError, Task, TaskError
from roundoff.tasks.check import check_task
from roundoff.tasks.of_profile import make_task
from roundoff.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "Message", "Problem", "RewardError", "Task", "TaskError", "check_task", "load_task", "make_task"]
