"""Tables of docs/results-remedies.md from run directories of the family `remedies`.

`python -m benchmarks.remedies_study RUNS... --out docs/results-remedies.md` replaces what stands between the two
markers of the file, and the study's rows in the table that `roundoff recommend` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from benchmarks.study_page import SCORES, Effect, publish, table
from roundoff import stats
from roundoff.report import words
from roundoff.report.arms import Arm

FAMILY = "remedies"
HARDWARE = {"mxfp4": "MXFP4", "nvfp4": "NVFP4", "hif4": "HiF4", "noise5": "5 % noise", "noise10": "10 % noise"}
"""Hardware, by the part of an id that names it."""
HEAD = ("id", "what", "seeds", "deployed [95 %]", "points [95 %]", "p", "clean [95 %]", "points [95 %]", "against")


def cells(key: str, arm: Arm, changes: Mapping[tuple[str, str], Effect]) -> list[str]:
    """The row of one arm."""
    scores = arm.scores
    assert scores is not None
    deployed, clean = (changes.get((key, score)) for score in SCORES)
    return [
        f"`{key}`",
        words.cell(arm.experiment.title),
        str(len(scores.seeds)),
        words.score_text(stats.score(scores.deployed)),
        str(deployed or ""),
        words.p_text(deployed.p_holm) if deployed else "",
        words.score_text(stats.score(scores.clean)),
        str(clean or ""),
        f"`{arm.experiment.baseline}`" if arm.experiment.baseline else "",
    ]


def document(arms: Mapping[str, Arm], changes: Mapping[tuple[str, str], Effect]) -> Iterator[str]:
    """All tables."""
    for hardware, text in HARDWARE.items():
        prefix = f"{FAMILY}-{hardware}"
        mine = {key: arm for key, arm in arms.items() if key == prefix or key.startswith(f"{prefix}-")}
        if mine:
            yield f"## {text}"
            yield ""
            yield from table(HEAD, (cells(key, arm, changes) for key, arm in mine.items() if arm.scores))


if __name__ == "__main__":
    publish(FAMILY, document, sys.argv[1:])
