"""Problems from the generators of `reasoning-gym` (arXiv:2505.24760), rewarded by the package's own scorers.

    settings = { dataset = "gsm_symbolic", seed = 3 }
    settings = { dataset = "chain_sum", config = { min_terms = 2, max_terms = 3 } }

Training and test problems are drawn from different seeds, and a training problem with the text of a test problem is
skipped, so the two are disjoint. A generator that gives other problems when called again with the same seed is refused.
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
"""Text that is appended to each question, by the form of the answer."""
SPARE = 4
"""Number of problems requested from the generator for each one needed, because some are equal."""

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymSettings(BaseModel):
    """The generator, the number of problems, and how responses are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = "gsm_symbolic"
    """Name of the generator."""
    config: dict[str, Any] = {}
    """The generator's own settings (its difficulty), except for its seed and size."""
    seed: int = Field(default=0, ge=0)
    """Seed that determines which problems are drawn."""
    train_problems: int = Field(default=1024, ge=1)
    """Number of different training problems."""
    test_problems: int = Field(default=256, ge=1)
    """Number of different test problems."""
    answer: Literal["strict", "tags", "whole"] = "strict"
    """Part of a response that the scorer gets: the text after the last `####`, the last <answer>, or all of it."""
    system_prompt: str = ""
    """First message of the conversation; if empty, the chat template's own."""
    instruction: str | None = None
    """Text that is appended to each question; None appends the usual one for the form of the answer."""


class ReasoningGymTask:
    """The problems of one `ReasoningGymSettings`, drawn when the task is created."""

    name = "reasoning-gym"

    def __init__(self, settings: ReasoningGymSettings) -> None:
        self.settings = settings
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._score: Callable[[str, Mapping[str, Any]], float] | None = None
        self._test = self._draw("test", settings.test_problems)
        self._train = self._draw("train", settings.train_problems)

    def train(self) -> Sequence[Problem]:
        """The `train_problems` different training problems."""
        return self._train

    def test(self) -> Sequence[Problem]:
        """The `test_problems` different test problems, none of which is a training problem."""
        return self._test

    def reward(self, problem: Problem, response: str) -> float:
        """The score of the package's scorer (0 to 1); 0.0 without a final answer, NaN if the scorer failed."""
        try:
            return self.reward_or_error(problem, response)
        except RewardError:
            return math.nan

    def reward_or_error(self, problem: Problem, response: str) -> float:
        """The score of the package's scorer (0 to 1); 0.0 without a final answer.

        Raises:
            RewardError: if the scorer raised, or returned anything but a number from 0 to 1.
        """
        answer = _final_answer(response, self.settings.answer)
        if not answer or self._score is None:
            return 0.0
        try:
            score = as_reward(self._score(answer, self._entries[problem.id]))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # each of 106 scorers may fail on odd text in its own way
            name = self.settings.dataset
            raise RewardError(f"the scorer of {name} raised {type(error).__name__}: {error}") from error
        if score < 0:
            raise RewardError(f"the scorer of {self.settings.dataset} must give 0 to 1, but gave {score!r}")
        return score

    def solution(self, problem: Problem) -> str | None:
        """The right answer in the form of a response, or None if the generator gives none that its scorer accepts."""
        answer = self._entries[problem.id]["answer"]
        form = {"strict": "#### {}", "tags": "<answer>{}</answer>", "whole": "{}"}[self.settings.answer]
        solution = form.format(answer)
        return solution if answer is not None and self.reward(problem, solution) == 1.0 else None

    def _draw(self, split: str, count: int) -> tuple[Problem, ...]:
        """`count` different problems that no other split has."""
        problems: list[Problem] = []
        for entry in self._candidates(split, count):
            question = str(entry["question"])
            identity = f"reasoning-gym/{self.settings.dataset}/{blake2b(question.encode(), digest_size=8).hexdigest()}"
            if identity in self._entries:
                continue
            self._entries[identity] = entry
            problems.append(self._problem(identity, question, entry))
            if len(problems) == count:
                return tuple(problems)
        raise TaskError(
            f"{split}_problems is {count}, but {self.settings.dataset} gave only {len(problems)} different ones in "
            f"{SPARE * count}: lower it, or make the problems more varied by config"
        )

    def _problem(self, identity: str, question: str, entry: Mapping[str, Any]) -> Problem:
        instruction = self.settings.instruction
        if instruction is None:
            instruction = INSTRUCTIONS[self.settings.answer]
        text = f"{question.strip()} {instruction}".strip()
        system = (Message("system", self.settings.system_prompt),) if self.settings.system_prompt else ()
        messages = (*system, Message("user", text))
        return Problem(identity, "\n\n".join(m.content for m in messages) + "\n", str(entry["answer"]), messages)

    def _candidates(self, split: str, count: int) -> Iterator[Mapping[str, Any]]:
        """Entries of the generator, some of which may be equal."""
        gym = require("reasoning_gym", "reasoning-gym")
        known = tuple(require("reasoning_gym.factory", "reasoning-gym").DATASETS)
        name, size = self.settings.dataset, SPARE * count
        if name not in known:
            raise TaskError(f"dataset must be a generator of reasoning-gym{nearest(name, known)}, but is {name!r}")
        for fixed in ("seed", "size"):
            if fixed in self.settings.config:
                raise TaskError(f"config.{fixed} is set by the task's own seed, train_problems and test_problems")
        # A generator draws item i from seed + i, so the seeds of the two sides must be far apart.
        digest = blake2b(f"{split} {self.settings.seed}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "big") >> 1
        try:
            generator = gym.create_dataset(name, seed=seed, size=size, **self.settings.config)
            again = gym.create_dataset(name, seed=seed, size=size, **self.settings.config)
        except (TypeError, ValueError, AssertionError) as error:
            raise TaskError(f"config does not suit {name}: {type(error).__name__}: {error}") from error
        for index in range(min(4, size)):
            if generator[index]["question"] != again[index]["question"]:
                raise TaskError(f"{name} gives different problems for the same seed, so runs could not be compared")
        self._score = generator.score_answer
        for index in range(size):
            with suppress(IndexError):  # the generator has fewer problems than requested
                yield generator[index]


def reasoning_gym(settings: Mapping[str, object]) -> ReasoningGymTask:
    """The task for a mapping of `ReasoningGymSettings` fields; absent fields take their defaults.

    Raises:
        TaskError: if a setting is wrong, or the generator has too few different problems.
        ConfigError: if reasoning-gym is not installed.
    """
    return ReasoningGymTask(checked(ReasoningGymSettings, settings, "reasoning-gym"))


def _final_answer(response: str, form: str) -> str | None:
    """The final answer of a response in this form, or None if it has none."""
    if form == "whole":
        return response.strip()
    if form == "tags":
        answers = _TAGS.findall(response)
        return answers[-1].strip() if answers else None
    _, marker, after = response.rpartition("####")
    return after.strip() if marker else None
