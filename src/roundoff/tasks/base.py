"""The interface of a task: problems with one right answer each, and a reward that is computed from text alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from roundoff.errors import RoundoffError


class TaskError(RoundoffError, ValueError):
    """A task cannot be used with its settings; the message names the setting and says what to do."""


PATHS_BEGIN = "a relative path begins at the TOML file that gives it, or, for --set, where roundoff was started"
"""Text that an error about a missing file adds."""


class RewardError(RoundoffError, RuntimeError):
    """A reward could not be computed; the message says why. The error is recorded, and the reward is 0."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with one right answer."""

    id: str
    """Identifier, unique within the task and the same in every run, by which scores of different runs are paired."""
    prompt: str
    """Text that a model without a chat template continues."""
    answer: str
    """The right final answer, in the form that the reward compares with."""
    messages: tuple[Message, ...] = ()
    """The prompt as a conversation, for a model with a chat template; if empty, every model gets `prompt`."""


@runtime_checkable
class Task(Protocol):
    """Training problems, disjoint test problems, and their reward.

    `train` and `test` are deterministic: in every process they return the same problems in the same order.
    """

    @property
    def name(self) -> str:
        """The name of this task in `TASKS`."""
        ...

    def train(self) -> Sequence[Problem]:
        """The problems to train on."""
        ...

    def test(self) -> Sequence[Problem]:
        """The problems to score on; none of them is a training problem."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the response ends in the right answer, else 0.0; it must not raise, whatever the text.

        Other values below 1.0 are trained on, but only 1.0 counts as solved. NaN means that the reward could not be
        computed. `tasks.score` says what else may be returned, and how long a reward may take.
        """
        ...

    def solution(self, problem: Problem) -> str | None:
        """A worked response with reward 1.0, or None if the task knows none."""
        ...
