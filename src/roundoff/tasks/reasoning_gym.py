"""Problems from the generators of `reasoning-gym` (arXiv:2505.24760), scored by the package's own scorers.

    settings = { dataset = "gsm_symbolic", seed = 3 }
    settings = { dataset = "chain_sum", config = { min_terms = 2, max_terms = 3 } }

The two sides are drawn from seeds of their own, and a training problem whose text is that of a test problem is passed
over, so that they are disjoint. A generator that does not repeat itself under one seed is refused.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from roundoff.config import nearest
from roundoff.optional_packages import require
from roundoff.tasks.base import Message, Problem, RewardError, TaskError
from roundoff.tasks.score import as_reward
from roundoff.tasks.settings import checked

INSTRUCTIONS = {
    "strict": 'Output the final answer after "####".',
    "tags": "Output the final answer between <answer> and </answer>.",
    "whole": "",
}
"""What is appended to each question, by the form of the answer."""
SPARE = 4
"""Problems asked of the generator for each one wanted, as some repeat one another."""

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymSettings(BaseModel):
    """Which generator, how many problems, and how responses are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = "gsm_symbolic"
    """Name of a generator."""
    config: dict[str, Any] = {}
    """The generator's own settings (difficulty), except for its seed and size."""
    seed: int = Field(default=0, ge=0)
    """Which problems are drawn."""
    train_problems: int = Field(default=1024, ge=1)
    """Different training problems."""
    test_problems: int = Field(default=256, ge=1)
    """Different test problems."""
    answer: Literal["strict", "tags", "whole"] = "strict"
    """The scorer is given what follows the last `####`, the last <answer>, or the whole response."""
    system_prompt: str = ""
    """First message of the conversation; empty: the chat template's own."""
    instruction: str | None = None
    """What is appended to each question. None: the usual one of the answer's form."""


class ReasoningGymTask:
    """The problems of one `ReasoningGymSettings`, drawn when the task is made."""

    name = "reasoning-gym"

    def __init__(self, settings: ReasoningGymSettings) -> None:
        self.settings = settings
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._score: Callable[[str, Mapping[str, Any]], float] | None = None
        self._test = self._draw("test", settings.test_problems)
        self._train = self._draw("train", settings.train_problems)

    def train(self) -> Sequence[Problem]:
        """`train_problems` different problems."""
        return self._train

    def test(self) -> Sequence[Problem]:
        """`test_problems` different problems, none of them a training problem."""
        return self._test

    def reward(self, problem: Problem, response: str) -> float:
        """What the package's scorer gives (0 to 1), 0.0 without a final answer, NaN where the scorer failed."""
        try:
            return self.reward_or_error(problem, response)
        except RewardError:
            return math.nan

    def reward_or_error(self, problem: Problem, response: str) -> float:
        """What the package's scorer gives (0 to 1), 0.0 without a final answer.

        Raises:
            RewardError: if the scorer raised, or gave what is no number from 0 to 1.
        """
        answer = _final_answer(response, self.settings.answer)
        if not answer or self._score is None:
            return 0.0
        try:
            score = as_reward(self._score(answer, self._entries[problem.id]))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # 106 scorers, each with ways of its own to stumble over odd text
            name = self.settings.dataset
            raise RewardError(f"the scorer of {name} raised {type(error).__name__}: {error}") from error
        if score < 0:
            raise RewardError(f"the scorer of {self.settings.dataset} must give 0 to 1, but gave {score!r}")
        return score

    def solution(self, problem: Problem) -> str | None:
        """The right answer in the form that is read, or None where the generator gives none."""
        answer = self._entries[problem.id]["answer"]
        form = {"strict": "#### {}", "tags": "<answer>{}</answer>", "whole": "{}"}[self.settings.answer]
        solution = form.format(answer)
        return solution if answer is not None and self.reward(problem, solution) == 1.0 else None

    def _draw(self, split: str, count: int) -> tuple[Problem, ...]:
        found: list[Problem] = []
        for entry in self._candidates(split, count):
            question = str(entry["question"])
            identity = f"reasoning-gym/{self.settings.dataset}/{blake2b(question.encode(), digest_size=8).hexdigest()}"
            if identity in self._entries:
                continue
            self._entries[identity] = entry
            found.append(self._problem(identity, question, entry))
            if len(found) == count:
                return tuple(found)
        raise TaskError(
            f"{split}_problems is {count}, but {self.settings.dataset} gave only {len(found)} different ones in "
            f"{SPARE * count}: lower it, or make the problems more varied by config"
        )

    def _problem(self, identity: str, question: str, entry: Mapping[str, Any]) -> Problem:
        instruction = self.settings.instruction
        if instruction is None:
            instruction = INSTRUCTIONS[self.settings.answer]
        asked = f"{question.strip()} {instruction}".strip()
        system = (Message("system", self.settings.system_prompt),) if self.settings.system_prompt else ()
        messages = (*system, Message("user", asked))
        return Problem(identity, "\n\n".join(m.content for m in messages) + "\n", str(entry["answer"]), messages)

    def _candidates(self, split: str, count: int) -> Iterator[Mapping[str, Any]]:
        """Problems of the generator, some of which may be equal."""
        gym = require("reasoning_gym", "reasoning-gym")
        known = tuple(require("reasoning_gym.factory", "reasoning-gym").DATASETS)
        name, size = self.settings.dataset, SPARE * count
        if name not in known:
            raise TaskError(f"dataset must be a generator of reasoning-gym{nearest(name, known)}, but is {name!r}")
        for fixed in ("seed", "size"):
            if fixed in self.settings.config:
                raise TaskError(f"config.{fixed} is set by the task's own seed, train_problems and test_problems")
        # A generator draws item i by seed + i: the seeds of the two sides must lie far apart.
        digest = blake2b(f"{split} {self.settings.seed}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "big") >> 1
        try:
            generator = gym.create_dataset(name, seed=seed, size=size, **self.settings.config)
            again = gym.create_dataset(name, seed=seed, size=size, **self.settings.config)
        except (TypeError, ValueError, AssertionError) as error:
            raise TaskError(f"config does not suit {name}: {type(error).__name__}: {error}") from error
        for index in range(min(4, size)):
            if generator[index]["question"] != again[index]["question"]:
                raise TaskError(f"{name} gives other problems each time under one seed, so runs could not be compared")
        self._score = generator.score_answer
        for index in range(size):
            with suppress(IndexError):  # a generator that holds fewer problems than it was asked for
                yield generator[index]


def reasoning_gym(settings: Mapping[str, object]) -> ReasoningGymTask:
    """The task for a mapping of `ReasoningGymSettings` fields; fields left out take their defaults.

    Raises:
        TaskError: a setting is wrong, or the generator has too few different problems.
        ConfigError: reasoning-gym is not installed.
    """
    return ReasoningGymTask(checked(ReasoningGymSettings, settings, "reasoning-gym"))


def _final_answer(response: str, form: str) -> str | None:
    if form == "whole":
        return response.strip()
    if form == "tags":
        found = _TAGS.findall(response)
        return found[-1].strip() if found else None
    _, marker, after = response.rpartition("####")
    return after.strip() if marker else None
