"""Chains of additions and subtractions, solved from left to right.

A problem is a chain of terms between 1 and `max_value`, joined by `+` and `-`. The response states the running result
after each operation, separated by `>`; the last number is the answer. Results may be negative.

    37-12+5=    ->  25>30
    12-37+5=    ->  -25>-20
    8+9=        ->  17

**Split.** A hash of the *signed terms in sorted order* assigns a problem to training or to test (one in eight). The
hash does not depend on the seed, so the two sides are disjoint by construction: for every seed, for every difficulty,
and up to the order of the terms (`8+9` and `9+8` are on the same side). A model that was warm-started on any training
problems has therefore never seen a test problem. It may have seen the first step of a test chain: `37-12` can be a
training problem where `37-12+5` is a test problem.

**Mix.** Each chain length gets an equal share of the problems. If a short length has too few different problems, the
longer ones make up for it.

There is no multiplication, and there are no brackets, bases other than ten, or spaces.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import product
from random import Random
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from roundoff.tasks.base import Problem
from roundoff.tasks.settings import checked

Split = Literal["train", "test"]

TEST_ONE_IN = 8
"""One problem in this many belongs to the test side."""

_COUNTED_SPACE = 20_000  # problems of both sides together; up to here each side is counted exactly (about 40 ms)
_USABLE_SHARE = 0.8  # of the expected size of a side that is too large to count; its true size is within 10 % of that
_RESPONSE = re.compile(r"-?[0-9]+(?:>-?[0-9]+)*")


class ArithmeticSettings(BaseModel):
    """Difficulty and size of the arithmetic task.

    The defaults are those the embedded model `tiny` was warmed up on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms_min: int = Field(default=2, ge=2, le=16)
    """Numbers in the shortest chain."""
    terms_max: int = Field(default=3, ge=2, le=16)
    """Numbers in the longest chain."""
    max_value: int = Field(default=50, ge=2, le=1_000_000)
    """Largest term; the smallest is 1."""
    seed: int = Field(default=0, ge=0)
    """Seed that determines which problems are drawn from the two sides of the split."""
    train_problems: int = Field(default=4096, ge=1, le=1_000_000)
    """Number of different training problems."""
    test_problems: int = Field(default=1024, ge=1, le=100_000)
    """Number of different test problems."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> Self:
        if self.terms_max < self.terms_min:
            raise ValueError(
                f"terms_max must be at least terms_min, but they are {self.terms_max} and {self.terms_min}"
            )
        return self

    @model_validator(mode="after")
    def _space_is_large_enough(self) -> Self:
        counts: dict[Split, int] = {"train": self.train_problems, "test": self.test_problems}
        for split, count in counts.items():
            room = sum(_capacity(terms, self.max_value, split) for terms in self.lengths)
            if room < count:
                raise ValueError(
                    f"{split}_problems is {count}, but chains of {self.terms_min} to {self.terms_max} terms up to "
                    f"{self.max_value} hold only {room} different {split} problems: "
                    f"lower {split}_problems, or raise max_value or terms_max"
                )
        return self

    @property
    def lengths(self) -> range:
        """The chain lengths in terms, shortest first."""
        return range(self.terms_min, self.terms_max + 1)


class ArithmeticTask:
    """The problems of one `ArithmeticSettings`, drawn on first use."""

    name = "arithmetic"
    reward_seconds = None
    """No limit, because the time to read a response is linear in its length."""

    def __init__(self, settings: ArithmeticSettings) -> None:
        self.settings = settings

    def train(self) -> Sequence[Problem]:
        """The `train_problems` different problems of the training side."""
        return self._train

    def test(self) -> Sequence[Problem]:
        """The `test_problems` different problems of the test side."""
        return self._test

    @cached_property
    def _train(self) -> Sequence[Problem]:
        return tuple(_draw_different(self.settings, "train", self.settings.train_problems))

    @cached_property
    def _test(self) -> Sequence[Problem]:
        return tuple(_draw_different(self.settings, "test", self.settings.test_problems))

    def train_stream(self, seed: int) -> Iterator[Problem]:
        """Endless problems of the training side, drawn with replacement, with equal shares of the lengths."""
        rng = Random(f"arithmetic/stream/{seed}")
        lengths = self.settings.lengths
        while True:
            terms = lengths[int(rng.random() * len(lengths))]
            while split_of(chain := _draw_chain(rng, terms, self.settings.max_value)) != "train":
                pass
            yield _problem(chain)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 if the number after the last `>` is the answer, else 0.0.

        Intermediate results are not checked, but the whole response must have the form `number>number>...`, apart from
        white space around it. Numbers are compared as text: `030` and `+30` are not `30`.
        """
        text = response.strip()
        if _RESPONSE.fullmatch(text) is None:
            return 0.0
        return float(text.rpartition(">")[2] == problem.answer)

    def solution(self, problem: Problem) -> str:
        """The running results of the chain, joined by `>`."""
        return ">".join(map(str, _running_results(_parse(problem.prompt))))


def arithmetic(settings: Mapping[str, object]) -> ArithmeticTask:
    """The arithmetic task for a mapping of `ArithmeticSettings` fields; absent fields take their defaults.

    Raises:
        TaskError: if a setting is unknown or out of range, or asks for more problems than there are.
    """
    return ArithmeticTask(checked(ArithmeticSettings, settings, "arithmetic"))


def split_of(chain: Sequence[int]) -> Split:
    """The side of the split that a chain of signed terms belongs to, whatever the order of its terms."""
    text = " ".join(f"{term:+d}" for term in sorted(chain))
    digest = blake2b(text.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_ONE_IN == 0 else "train"


def _draw_different(settings: ArithmeticSettings, split: Split, count: int) -> list[Problem]:
    """`count` different problems of one side, with the lengths in random order."""
    # Only Random.random() is used, because it alone is documented to give the same numbers in every version of Python.
    rng = Random(f"arithmetic/{split}/{settings.seed}")
    chains: list[tuple[int, ...]] = []
    left = count
    for terms in settings.lengths:
        share = left // (settings.terms_max - terms + 1)
        number = min(share, _capacity(terms, settings.max_value, split))
        seen: dict[tuple[int, ...], None] = {}  # a dict keeps the order in which chains are drawn
        while len(seen) < number:
            chain = _draw_chain(rng, terms, settings.max_value)
            if split_of(chain) == split:
                seen[chain] = None
        chains += seen
        left -= number
    order = [rng.random() for _ in chains]
    return [_problem(chain) for _, chain in sorted(zip(order, chains, strict=True))]


def _draw_chain(rng: Random, terms: int, max_value: int) -> tuple[int, ...]:
    """The signed terms of one chain, the first of which is positive."""
    values = [1 + int(rng.random() * max_value) for _ in range(terms)]
    signs = [1] + [1 if rng.random() < 0.5 else -1 for _ in range(terms - 1)]
    return tuple(sign * value for sign, value in zip(signs, values, strict=True))


def _capacity(terms: int, max_value: int, split: Split) -> int:
    """Number of different chains of this length that one side of the split can be asked for."""
    space = max_value**terms * 2 ** (terms - 1)
    if space <= _COUNTED_SPACE:
        signed = [value for value in range(-max_value, max_value + 1) if value]
        chains = product(range(1, max_value + 1), *[signed] * (terms - 1))
        return sum(split_of(chain) == split for chain in chains)
    expected = space // TEST_ONE_IN if split == "test" else space - space // TEST_ONE_IN
    return int(_USABLE_SHARE * expected)


def _problem(chain: Sequence[int]) -> Problem:
    text = str(chain[0]) + "".join(f"{term:+d}" for term in chain[1:])
    return Problem(id=f"arithmetic/{text}", prompt=f"{text}=", answer=str(sum(chain)))


def _parse(prompt: str) -> list[int]:
    """The signed terms of a prompt such as `37-12+5=`."""
    return [int(term) for term in re.findall(r"[+-]?[0-9]+", prompt)]


def _running_results(chain: Sequence[int]) -> list[int]:
    results = [chain[0] + chain[1]]
    for term in chain[2:]:
        results.append(results[-1] + term)
    return results
