"""The outcomes of an evaluation, one for each test problem, in memory and as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from roundoff.errors import RoundoffError
from roundoff.runs.health import FLAWS, Tally


class DamagedRunError(RoundoffError, ValueError):
    """A run directory, or a file in it, cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test problem was answered."""

    id: str
    prompt: str
    answer: str
    deployed: tuple[int, ...]
    """1 where it was solved with the hardware on, 0 where not; one entry for each noise draw."""
    clean: int
    """1 if it was solved with the hardware off, 0 if not."""
    response: str
    """The response with the hardware on, in the first draw."""
    clean_response: str
    """The response with the hardware off."""
    truncated: bool = False
    """Whether that first response was cut at the length limit."""
    flaws: tuple[str, ...] = field(default=(), compare=False)
    """The flaw of the response in each draw (`roundoff.runs.health`), or an empty text. Files of version 0.1 have none,
    which is why two outcomes are compared without it."""
    clean_flaw: str = field(default="", compare=False)
    """The flaw of the response with the hardware off, or an empty text."""

    def deployed_flaws(self) -> tuple[str, ...]:
        """The flaw of each draw; from files of version 0.1, the flaw of the first draw as far as the file shows it."""
        if self.flaws:
            return self.flaws
        return ("truncated" if self.truncated else "" if self.response.strip() else "empty",)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per-problem outcomes of the whole test set after `step` training steps."""

    step: int
    outcomes: tuple[Outcome, ...]
    nonfinite_at: str = field(default="", compare=False)
    """The module at which responses with the hardware on became NaN or infinite; empty where none did. It is not kept
    in the file."""

    @property
    def deployed(self) -> float:
        """Accuracy with the hardware on (fraction), mean over problems and draws."""
        return sum(sum(o.deployed) / len(o.deployed) for o in self.outcomes) / len(self.outcomes)

    @property
    def clean(self) -> float:
        """Accuracy with the hardware off (fraction)."""
        return sum(o.clean for o in self.outcomes) / len(self.outcomes)

    @property
    def deployed_tally(self) -> Tally:
        """Flaws of the responses with the hardware on, over all draws."""
        return Tally.of(flaw for outcome in self.outcomes for flaw in outcome.deployed_flaws())

    @property
    def clean_tally(self) -> Tally:
        """Flaws of the responses with the hardware off."""
        return Tally.of(outcome.clean_flaw for outcome in self.outcomes)

    def numbers(self) -> dict[str, float]:
        """The numbers for the log: both scores, the share of responses with each flaw, and the number of problems."""
        tallies = {"deployed": self.deployed_tally.shares(), "clean": self.clean_tally.shares()}
        shares = {f"{side}_{name}": share for side, found in tallies.items() for name, share in found.items()}
        return {"deployed": self.deployed, "clean": self.clean, **shares, "problems": len(self.outcomes)}


def evaluation_file(run: Path, step: int) -> Path:
    """The file of the outcomes after `step`, of the run in directory `run`."""
    return run / "evaluations" / f"step-{step:06d}.jsonl"


def evaluation_lines(evaluation: Evaluation) -> str:
    """The outcomes as JSON, one on each line."""
    return "".join(json.dumps(asdict(outcome)) + "\n" for outcome in evaluation.outcomes)


def read_evaluation(run: Path, step: int, problems: int | None = None) -> Evaluation:
    """The outcomes after `step` of the run in directory `run`; there must be `problems` of them, where that is known.

    Raises:
        DamagedRunError: if the file is missing or malformed, or holds a problem twice or not all of them.
    """
    path = evaluation_file(run, step)
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        outcomes = tuple(_outcome(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}") from error
    if not outcomes:
        raise DamagedRunError(f"{path} holds no outcome")
    if len({outcome.id for outcome in outcomes}) < len(outcomes):
        raise DamagedRunError(f"{path}: a problem was scored twice in one evaluation")
    if problems is not None and len(outcomes) != problems:
        raise DamagedRunError(f"{path} holds {len(outcomes)} outcomes, but {problems} problems were scored")
    return Evaluation(step, outcomes)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    """The outcome of one line; its types and values are checked."""
    outcome = Outcome(**{**row, "deployed": tuple(row["deployed"]), "flaws": tuple(row.get("flaws", ()))})
    texts = outcome.id, outcome.prompt, outcome.answer, outcome.response, outcome.clean_response
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of the problem {outcome.id!r} is of another type")
    if not outcome.deployed or any(solved not in (0, 1) for solved in (*outcome.deployed, outcome.clean)):
        raise ValueError(f"{outcome.id} must be solved (1) or not (0) in each draw, but is {outcome.deployed}")
    if len(outcome.flaws) not in (0, len(outcome.deployed)):
        raise ValueError(f"{outcome.id} must have a flaw (or an empty text) for each draw, but has {outcome.flaws}")
    if any(flaw not in FLAWS for flaw in (*outcome.flaws, outcome.clean_flaw)):
        raise ValueError(f"{outcome.id}: a flaw must be one of {', '.join(FLAWS[1:])}, or empty")
    return outcome
