"""Problems that one arm solved and the other did not, with the responses of one seed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from roundoff.report.arms import Arm
from roundoff.report.compare import paired_scores
from roundoff.runs.outcomes import Outcome

EACH_WAY = 3
"""Number of problems shown in each direction."""
MOST_CHARACTERS = 1200
"""Maximum number of characters of a response that is shown in full; of a longer one the middle is left out."""


@dataclass(frozen=True)
class Flip:
    """One problem with the responses of both arms: hardware on, first noise draw."""

    problem: str
    prompt: str
    answer: str
    gained: bool
    """True if the treatment solved it and the baseline did not, False if it is the other way round."""
    treatment_response: str
    baseline_response: str
    treatment_solved: float
    """Share of seeds and draws in which the treatment solved it (fraction)."""
    baseline_solved: float
    """Share of seeds and draws in which the baseline solved it (fraction)."""


@dataclass(frozen=True)
class Flips:
    """Flips between two arms: how many there are per seed, and the clearest few."""

    seed: int
    """Seed of the treatment whose responses are shown."""
    baseline_seed: int
    """Seed of the baseline whose responses are shown; another one only if each arm has a single run."""
    gained: float
    """Number of problems that only the treatment solved, as a mean over seeds."""
    lost: float
    """Number of problems that only the baseline solved, as a mean over seeds."""
    problems: int
    """Number of test problems."""
    shown: tuple[Flip, ...]


def find_flips(treatment: Arm, baseline: Arm) -> Flips:
    """The flips between two arms, beginning with those that flip in most seeds.

    Responses are those of the lowest common seed, or, if each arm has a single run, those of the two runs.

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
    """Outcomes of one seed's last evaluation by problem."""
    run = next(run for run in arm.final if run.seed == seed)
    return {outcome.id: outcome for outcome in run.evaluation(run.status.total_steps).outcomes}


def _solved(outcomes: dict[str, Outcome], problem: str) -> int:
    """1 if the response that is shown, that of the first draw, was right, else 0."""
    return outcomes[problem].deployed[0]


def _response(outcome: Outcome) -> str:
    """The response to show, with a note if it was not computed, has no reward, or has no text."""
    notes = {
        "nonfinite": "[not computed any further: the logits were not finite]",
        "reward_error": "[the reward failed and counts as 0]",
        "empty": "[no text]",
    }
    note = notes.get(outcome.deployed_flaws()[0])
    return shorten(outcome.response) if note is None else f"{shorten(outcome.response)} {note}".strip()


def shorten(text: str) -> str:
    """The text; if it is long, its beginning and end with a note of how much is left out between them."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
