"""Problems that one arm solved and the other did not, with the actual responses of one seed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from roundoff.report.arms import Arm
from roundoff.report.compare import paired_scores
from roundoff.runs.outcomes import Outcome

EACH_WAY = 3
"""Problems shown in each direction."""
MOST_CHARACTERS = 1200
"""Longest response shown in full; of a longer one the middle is left out, for the answer stands at the end."""


@dataclass(frozen=True)
class Flip:
    """One problem with both arms' responses, deployed, first draw."""

    problem: str
    prompt: str
    answer: str
    gained: bool
    """True where the treatment solved it and the baseline did not."""
    treatment_response: str
    baseline_response: str
    treatment_solved: float
    """Share of seeds and draws in which the treatment solved it."""
    baseline_solved: float


@dataclass(frozen=True)
class Flips:
    """Flips between two arms: how many in a mean seed, and the clearest few."""

    seed: int
    """Seed whose responses are shown."""
    baseline_seed: int
    """The same of the baseline: another one only where each arm has a single run."""
    gained: float
    """Problems that the treatment alone solved, mean over seeds."""
    lost: float
    problems: int
    shown: tuple[Flip, ...]


def find_flips(treatment: Arm, baseline: Arm) -> Flips:
    """Flips of the lowest common seed (of two single runs, those of each), those first that flip in most seeds.

    Raises:
        ConfigError: if the arms cannot be paired.
    """
    new, old = paired_scores(treatment, baseline)
    seed, other = new.seeds[0], old.seeds[0]
    difference = new.deployed - old.deployed
    mean = difference.mean(axis=0)
    ours, theirs = _outcomes(treatment, seed), _outcomes(baseline, other)
    shown: list[Flip] = []
    for sign in (1, -1):
        order = np.argsort(-sign * mean, kind="stable")
        flipped = (i for i in order if sign * (_solved(ours, new.problems[i]) - _solved(theirs, new.problems[i])) > 0)
        for i in islice(flipped, EACH_WAY):
            one, two = ours[new.problems[i]], theirs[new.problems[i]]
            shown.append(
                Flip(
                    problem=one.id,
                    prompt=shorten(one.prompt),
                    answer=one.answer,
                    gained=sign > 0,
                    treatment_response=_response(one),
                    baseline_response=_response(two),
                    treatment_solved=float(new.deployed[:, i].mean()),
                    baseline_solved=float(old.deployed[:, i].mean()),
                )
            )
    gained, lost = (float((sign * difference > 0).sum()) / len(new.seeds) for sign in (1, -1))
    return Flips(seed, other, gained, lost, len(new.problems), tuple(shown))


def _outcomes(arm: Arm, seed: int) -> dict[str, Outcome]:
    run = next(run for run in arm.final if run.seed == seed)
    return {outcome.id: outcome for outcome in run.evaluation(run.status.total_steps).outcomes}


def _solved(outcomes: dict[str, Outcome], problem: str) -> int:
    """Whether the response that is shown, that of the first draw, was right."""
    return outcomes[problem].deployed[0]


def _response(outcome: Outcome) -> str:
    """The response that is shown, and a note where it is none because it was not computed, or has no text."""
    notes = {
        "nonfinite": "[not computed any further: the logits were not finite]",
        "reward_error": "[the reward failed and counts as 0]",
        "empty": "[no text]",
    }
    note = notes.get(outcome.deployed_flaws()[0])
    return shorten(outcome.response) if note is None else f"{shorten(outcome.response)} {note}".strip()


def shorten(text: str) -> str:
    """The text, or its beginning and end with a note of how much is left out between them."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
