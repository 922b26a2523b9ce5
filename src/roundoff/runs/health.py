"""Counts of the responses that are no normal answer, in a run or on a test set, and sentences about them.

A response has a **flaw** in four cases, and counts under the first that applies:

| flaw | what happened |
|---|---|
| `nonfinite` | the logits were NaN or infinite, so the response could not be computed to its end; it solves nothing |
| `reward_error` | the task's reward raised an error or gave no finite number; the reward counts as 0 |
| `truncated` | it reached the length limit without an end token; the reward is that of the text so far |
| `empty` | it ended at once, without a text |

This module does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from roundoff.errors import RoundoffError

Flaw = Literal["", "nonfinite", "reward_error", "truncated", "empty"]
FLAWS: tuple[str, ...] = get_args(Flaw)
UNTRAINED = "nothing was trained"
"""The words with which the reason begins why a run that reached its end trained nothing."""
NOTED_SHARE = 0.5
"""From this share on, untrained steps and responses without an end or a text are noted (fraction)."""


class NonFiniteOutputError(RoundoffError, ArithmeticError):
    """The model's output is NaN or infinite where there must be a number; the message names the first module."""


class FailedRewardsError(RoundoffError, RuntimeError):
    """The task's reward failed for every response, so that there is nothing to score or to train on."""


def flaw_of(text: str, *, nonfinite: bool, reward_error: bool, truncated: bool) -> Flaw:
    """The flaw of one response, or an empty text."""
    if nonfinite:
        return "nonfinite"
    if reward_error:
        return "reward_error"
    if truncated:
        return "truncated"
    return "" if text.strip() else "empty"


@dataclass(frozen=True, slots=True)
class Tally:
    """The number of responses with each flaw; a response counts in one field at most."""

    responses: int
    nonfinite: int = 0
    reward_error: int = 0
    truncated: int = 0
    empty: int = 0

    @classmethod
    def of(cls, flaws: Iterable[str]) -> Tally:
        """The tally of responses, given the flaw of each."""
        counts = Counter(flaws)
        return cls(sum(counts.values()), *(counts[name] for name in FLAWS[1:]))

    def shares(self) -> dict[str, float]:
        """The fraction of the responses that has each flaw."""
        return {name: getattr(self, name) / max(1, self.responses) for name in FLAWS[1:]}

    def failures(self) -> tuple[str, ...]:
        """A sentence for everything that the simulation or the task could not compute; empty where all was computed."""
        of = f"of {self.responses:,}"
        said = []
        if self.nonfinite:
            was = "response was" if self.responses == 1 else "responses were"
            said.append(f"{self.nonfinite:,} {of} {was} not computed: the logits were not finite")
        if self.reward_error:
            said.append(f"{self.reward_error:,} {of} rewards could not be computed and count as 0")
        return tuple(said)

    def notes(self) -> tuple[str, ...]:
        """A sentence for everything a reader of the score must know: failures, and flaws of half the responses."""
        limit = NOTED_SHARE * self.responses
        cut, empty = (f"{n:,} of {self.responses:,} responses" for n in (self.truncated, self.empty))
        said = [f"{cut} reached the length limit without an end"] if self.truncated >= limit > 0 else []
        said += [f"{empty} had no text"] if self.empty >= limit > 0 else []
        return (*self.failures(), *said)

    def words(self) -> tuple[str, ...]:
        """A sentence for every flaw that occurred."""
        of = f"of {self.responses:,} responses"
        cut = (f"{self.truncated:,} {of} reached the length limit without an end",) if self.truncated else ()
        empty = (f"{self.empty:,} {of} had no text",) if self.empty else ()
        return (*self.failures(), *cut, *empty)


@dataclass(frozen=True, slots=True)
class Health:
    """Counts of the rollouts and steps of a run, taken from the rows of its metrics."""

    steps: int
    """Number of steps whose row says whether they trained."""
    trained: int
    """Number of steps with an update."""
    rollouts: int
    """Number of rollouts sampled."""
    nonfinite: int
    """Number of rollouts that could not be computed."""
    reward_errors: int
    """Number of rollouts whose reward failed."""
    truncated: float
    """Share of rollouts cut at the length limit or not computed (fraction)."""
    empty: float
    """Share of rollouts without a text (fraction)."""

    @property
    def untrained(self) -> str:
        """Why nothing was trained although steps were taken; empty where something was, or where no row says."""
        if self.trained or not self.steps:
            return ""
        if self.nonfinite == self.rollouts:
            why = f"none of the {self.rollouts:,} rollouts could be computed, for the logits were not finite"
        elif self.reward_errors == self.rollouts:
            why = f"the reward of every one of the {self.rollouts:,} rollouts failed"
        elif self.empty == 1:
            why = f"every one of the {self.rollouts:,} rollouts was empty"
        else:
            why = "the rewards within each group were equal"
            why += ", and every rollout reached the length limit without an end" if self.truncated == 1 else ""
        parts = "" if self.nonfinite == self.rollouts else "".join(f"; {line}" for line in self.failures())
        return f"{UNTRAINED} in {self.steps:,} step{'s' if self.steps > 1 else ''}: {why}{parts}"

    def failures(self) -> tuple[str, ...]:
        """A sentence for everything that could not be computed."""
        said = []
        if self.nonfinite:
            said.append(
                f"{self.nonfinite:,} of {self.rollouts:,} rollouts were not computed (the logits were not finite) and "
                "were left out of training"
            )
        if self.reward_errors:
            said.append(f"the rewards of {self.reward_errors:,} of {self.rollouts:,} rollouts failed and count as 0")
        return tuple(said)

    def notes(self) -> tuple[str, ...]:
        """A sentence for everything in the training that a reader of the score must know; empty for an ordinary run."""
        if self.untrained:
            return (self.untrained,)
        said = list(self.failures())
        if self.steps - self.trained >= NOTED_SHARE * self.steps > 0:
            said.append(f"only {self.trained:,} of {self.steps:,} steps trained anything: no group had unequal rewards")
        if self.rollouts and self.truncated == 1:
            said.append("every rollout reached the length limit without an end")
        return tuple(said)


def health_of(metrics: Sequence[Mapping[str, Any]], group_size: int) -> Health:
    """The health of a run whose groups hold `group_size` rollouts; rows without counts are skipped."""
    rows = [row for row in metrics if row["step"] > 0 and row.get("prompts")]
    sizes = [int(row["prompts"]) * group_size for row in rows]
    said = [bool(row["trained"]) for row in rows if row.get("trained") is not None]

    def share(name: str) -> float:
        found = sum(size * float(row.get(name) or 0.0) for row, size in zip(rows, sizes, strict=True))
        return found / max(1, sum(sizes))

    return Health(
        steps=len(said),
        trained=sum(said),
        rollouts=sum(sizes),
        nonfinite=sum(int(row.get("nonfinite") or 0) for row in rows),
        reward_errors=sum(int(row.get("reward_errors") or 0) for row in rows),
        truncated=share("truncated"),
        empty=share("empty"),
    )
