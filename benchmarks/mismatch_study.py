"""Tables and figure of docs/results-mismatch.md from run directories of the family `mismatch`.

`python -m benchmarks.mismatch_study RUNS... --out docs/results-mismatch.md` replaces what stands between the two
markers of the file, and draws the figure beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.mismatch_rule import dose, over_steps_of, rule
from benchmarks.study_page import SCORES, Effect, corrected, publish, table
from roundoff import stats
from roundoff.report import words
from roundoff.report.arms import Arm
from roundoff.report.compare import paired_scores

FAMILY = "mismatch"
HARDWARE = {
    "fp8": "FP8",
    "mxfp8": "MXFP8",
    "noise2": "2 % noise",
    "hif4": "HiF4",
    "nvfp4": "NVFP4",
    "noise5": "5 % noise",
    "mxfp4": "MXFP4",
    "noise10": "10 % noise",
}
"""Arithmetic of rollouts, by the part of an id that names it."""
CORRECTIONS = {
    "": "none",
    "token": "token weights",
    "icepop": "IcePop",
    "sequence": "sequence mask",
    "geometric": "geometric rejection",
    "bypass": "bypass",
}
"""Corrections, by the part of an id that names them."""


def name(hardware: str, trainer: str = "plain", correction: str = "") -> str:
    """Id of the experiment of an arm."""
    parts = (FAMILY, hardware, "unified" if trainer == "same" else "", correction)
    return "-".join(part for part in parts if part)


def over_steps(arm: Arm, key: str) -> float:
    """Mean over the runs of the median over the steps."""
    return fmean(over_steps_of(run, key) for run in arm.final)


def left_out(arm: Arm) -> str:
    """Share of the response tokens whose loss a correction left out or cut, as a percentage."""
    correction = arm.experiment.algorithm.correction
    if correction is None or correction.bypass_mode:
        return ""
    return words.percent(
        over_steps(arm, "rollout_rs_masked_fraction" if correction.rollout_rs else "mismatch_cut_token")
    )


def rows(arms: Mapping[str, Arm], changes: Mapping[tuple[str, str], Effect], hardware: str) -> Iterator[list[str]]:
    """The arms of one arithmetic of rollouts."""
    for trainer in ("plain", "same"):
        for correction, text in CORRECTIONS.items():
            key = name(hardware, trainer, correction)
            if key not in arms or (scores := arms[key].scores) is None:
                continue
            arm = arms[key]
            yield [
                trainer,
                text,
                str(len(scores.seeds)),
                f"{over_steps(arm, 'mismatch_k3_kl'):.2g}",
                f"{over_steps(arm, 'mismatch_ess_seq'):.2f}",
                left_out(arm),
                words.score_text(stats.score(scores.deployed)),
                str(changes.get((key, "deployed"), "")),
                words.score_text(stats.score(scores.clean)),
                str(changes.get((key, "clean"), "")),
            ]


HEAD = (
    "trainer",
    "correction",
    "seeds",
    "KL",
    "ESS",
    "left out",
    "deployed [95 %]",
    "points [95 %]",
    "clean [95 %]",
    "points [95 %]",
)


RULE_HEAD = ("rollouts in", "KL at which a point is lost [95 %]", "loss grows as KL to the", "largest error (points)")
GROUPS = {
    "formats": [part for part in HARDWARE if not part.startswith("noise")],
    "noise": [part for part in HARDWARE if part.startswith("noise")],
    "both": list(HARDWARE),
}


def rules(arms: Mapping[str, Arm]) -> Iterator[list[str]]:
    """Whether the measured KL predicts what a plain trainer loses without a correction: formats, noise and both.

    The score is that in plain arithmetic. What is lost on the rollouts' arithmetic is mostly the cost of computing on
    it, which is no matter of a mismatch.
    """
    plain = arms[f"{FAMILY}-clean"]
    for text, group in GROUPS.items():
        found = rule({h: dose(arms[name(h)], plain, "clean") for h in group if name(h) in arms})
        yield [text, *(("", "", "") if found is None else (str(found), f"{found.exponent:.2f}", f"{found.error:.1f}"))]


def pooled(arms: Mapping[str, Arm]) -> Iterator[list[str]]:
    """What each correction did on average over formats, and over levels of noise, against the same without it.

    The outcome of a problem is its mean over the arithmetics of the group; p-values are corrected over this table.
    """
    kinds = [(text, "plain", c) for c, text in CORRECTIONS.items() if c] + [("unified", "same", "")]
    kinds += [(f"unified, {text}", "same", c) for c, text in CORRECTIONS.items() if c]
    found: dict[tuple[str, str, str], stats.Interval] = {}
    for text, trainer, correction in kinds:
        for group in ("formats", "noise"):
            keys = [name(hardware, trainer, correction) for hardware in GROUPS[group]]
            if keys and all(key in arms for key in keys):
                pairs = [paired_scores(arms[key], arms[arms[key].experiment.baseline or ""]) for key in keys]
                seeds = sorted(set.intersection(*(set(new.seeds) for new, _ in pairs)))
                for score in SCORES:
                    new, old = (
                        np.mean([getattr(side[i].of_seeds(seeds), score) for side in pairs], axis=0) for i in (0, 1)
                    )
                    found[text, group, score] = stats.paired_benefit(new, old)
    effects = corrected(found)
    for text, *_ in kinds:
        cells = [str(effects.get((text, group, score), "")) for group in ("formats", "noise") for score in SCORES]
        if any(cells):
            yield [text, *cells]


def figure(arms: Mapping[str, Arm], path: Path) -> None:
    """Final accuracy against the measured KL, one line a correction, with 95 % intervals."""
    from benchmarks.study_figure import Line, Point, draw

    def line(text: str, correction: str, score: str) -> Line:
        points = []
        for hardware, shown in HARDWARE.items():
            arm = arms.get(name(hardware, "plain", correction))
            if arm is not None and arm.scores is not None:
                interval = stats.score(getattr(arm.scores, score))
                points.append(Point(over_steps(arm, "mismatch_k3_kl"), interval, shown, hardware.startswith("noise")))
        return Line(text, tuple(points))

    panels = {}
    for score, title in zip(SCORES, ("on the rollouts' arithmetic", "in plain arithmetic"), strict=True):
        lines = [line(text, correction, score) for correction, text in CORRECTIONS.items()]
        reference = arms[f"{FAMILY}-clean"].scores
        level = None if reference is None else stats.score(getattr(reference, score))
        panels[f"accuracy {title}"] = (lines, level)
    draw(panels, path, x="KL of rollouts from training (k3, nats per token, median over steps)")


def document(arms: Mapping[str, Arm], changes: Mapping[tuple[str, str], Effect]) -> Iterator[str]:
    """All tables."""
    yield "## What each correction did"
    yield ""
    yield "Means over the five formats, and over the three levels of noise, against the same rollouts and trainer"
    yield "without a correction (`unified` against a plain trainer), in points; corrected over the tests of this table:"
    yield ""
    yield from table(("", "formats: deployed", "formats: clean", "noise: deployed", "noise: clean"), pooled(arms))
    yield "## A rule of thumb?"
    yield ""
    yield from table(RULE_HEAD, rules(arms))
    for hardware, text in HARDWARE.items():
        found = list(rows(arms, changes, hardware))
        if found:
            yield f"## Rollouts in {text}"
            yield ""
            yield from table(HEAD, found)


def main(arguments: Sequence[str]) -> None:
    """Publish the tables, with the figure beside the page."""
    study, out = publish(FAMILY, document, arguments)
    if out is not None:
        figure(study.arms, out.parent / "figures" / "mismatch.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
