"""What a task is: problems with one right answer each, and a reward computed from text alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from roundoff.errors import RoundoffError


class TaskError(RoundoffError, ValueError):
    """Settings of a task that cannot be used; the message names the setting and says what to do."""


PATHS_BEGIN = "a relative path begins at the TOML file that gives it, or, for --set, where roundoff was started"
"""What an error about a missing file adds."""


class RewardError(RoundoffError, RuntimeError):
    """A reward that could not be computed; the message says why. It is recorded, and the reward is 0."""


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
    """Unique within the task and the same in every run: scores of different runs are paired by it."""
    prompt: str
    """The text that a model without a chat template continues."""
    answer: str
    """The right final answer, in the form the reward compares with."""
    messages: tuple[Message, ...] = ()
    """The same as a conversation, for a model with a chat template; empty: `prompt` is meant for every model."""


@runtime_checkable
class Task(Protocol):
    """Training problems, disjoint test problems, and their reward.

    `train` and `test` are deterministic: they return the same problems in the same order in every process.
    """

    @property
    def name(self) -> str:
        """The key of this task in `TASKS`."""
        ...

    def train(self) -> Sequence[Problem]:
        """Problems to train on."""
        ...

    def test(self) -> Sequence[Problem]:
        """Problems to score on; none of them is a training problem."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 where the response ends in the right answer, else 0.0. Never raises, whatever the text.

        Values below 1.0 are rewards to train on, but only 1.0 counts as solved; NaN says that it could not be computed.
        What else may come back, and how long it may take, is said in `tasks.score`.
        """
        ...

    def solution(self, problem: Problem) -> str | None:
        """A worked response with reward 1.0, or None where the task knows none."""
        ...
