"""The answer of `roundoff compare A B`: two runs or two arms, compared in plain words with their error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roundoff import stats
from roundoff.config import ConfigError, nearest
from roundoff.report import words
from roundoff.report.arms import Arm, Scores, group_arms
from roundoff.report.compare import VERDICTS, Comparison, compare_arms, paired_scores
from roundoff.report.status import arm_notes
from roundoff.runs.record import find_runs

LISTED = 8
"""Maximum number of differing settings that are named one by one."""


@dataclass(frozen=True)
class Pair:
    """Two arms, their scores over the seeds that are complete in both, and their difference."""

    treatment: Arm
    baseline: Arm
    new: Scores
    """Scores of the treatment."""
    old: Scores
    """Scores of the baseline."""
    comparison: Comparison
    equivalence: stats.Equivalence | None
    """Tests of whether the loss is below a margin; None if no margin was given."""


def find_arm(name: str, root: Path) -> Arm:
    """The arm that a name stands for.

    Args:
        name: a run's directory, a directory above runs, or the id of an experiment with runs in `root`.
        root: directory in which runs are looked for.

    Raises:
        ConfigError: if there is no such run, or the name stands for several arms, which the message lists.
    """
    beside = root / name
    path = next((path for path in (Path(name), beside) if path.is_dir()), None)
    if path is not None:
        runs, skipped = find_runs([path])
    else:
        everything, skipped = find_runs([root])
        runs = [run for run in everything if run.experiment.id == name]
        known = tuple(dict.fromkeys(run.experiment.id for run in everything))
        if not runs:
            raise ConfigError(
                f"there is no run of {name!r} in {root}{nearest(name, known)} (`roundoff runs` lists what there is)"
            )
    if not runs:
        raise ConfigError("\n".join((f"there is no run in {path} that can be read", *skipped)))
    arms, left_out = group_arms(runs)
    if len(arms) > 1:
        places = "\n  ".join(str(arm.runs[0].path.parent) for arm in arms)
        raise ConfigError(f"{name} stands for {len(arms)} arms: name one of\n  {places}")
    if not arms:
        raise ConfigError("\n".join(left_out))
    return arms[0]


def make_pair(treatment: Arm, baseline: Arm, *, margin: float | None) -> Pair:
    """The comparison of two arms; two single runs are paired by problem alone, whatever their seeds.

    Args:
        treatment: the arm that is judged.
        baseline: the arm that it is judged against.
        margin: the loss that could be borne (fraction), or None.

    Raises:
        ConfigError: if they cannot be compared; the message gives the reason.
    """
    comparison = compare_arms(treatment, baseline)
    new, old = paired_scores(treatment, baseline)
    limits = None if margin is None else stats.equivalence(new.deployed, old.deployed, margin)
    return Pair(treatment, baseline, new, old, comparison, limits)


def pair_text(pair: Pair) -> RenderableType:
    """The answer, the figures behind it and their basis, for a terminal of 80 columns."""
    c = pair.comparison
    parts: list[RenderableType] = [Text(_answer(pair) + _collapsed(pair), style="bold" if c.is_shown else ""), Text("")]
    parts.append(_figures(pair))
    parts += [Text(""), Text(_basis(pair), style="dim")]
    if pair.equivalence is not None:
        parts += [Text(""), Text(_equivalence(pair.equivalence))]
    if len(c.seeds) < stats.MIN_SEEDS:
        parts += [Text(""), Text("\n".join(_flips(pair)))]
    return Group(*parts)


def _answer(pair: Pair) -> str:
    """The conclusion in one or two sentences."""
    c = pair.comparison
    d = c.deployed
    size = f"{abs(100 * d.estimate):.1f} points"
    side = "more" if d.estimate > 0 else "less"
    bounds = f"95 %: {words.points(d.low)} to {words.points(d.high)}"
    if d.p is None:
        one, two = ("One seed", "Two seeds") if c.unpaired else ("One run each", "Two seeds each")
        count = (one if len(c.seeds) == 1 else two) + (" in common" if c.unpaired else "")
        return (
            f"Not testable. {count}: A scores {size} {side} than B with the hardware on ({bounds}, over problems "
            "only). Another seed may well give another answer; a test needs three."
        )
    p = f"p {words.p_text(d.p)}"
    if c.is_shown:
        verb = {
            "benefit": ("A helps", "A hurts"),
            "training": ("The training of A is better", "The training of A is worse"),
            "cost": ("A gains", "The hardware of A costs accuracy"),
        }[c.kind]
        return f"{verb[d.estimate < 0]}: it scores {size} {side} than B with the hardware on ({bounds}; {p})."
    return (
        f"{VERDICTS[c.kind][2].replace('shown', 'is shown').capitalize()}: A scores {size} {side} than B with the "
        f"hardware on, and over all seeds and problems of this kind the difference may be anything from "
        f"{words.points(d.low)} to {words.points(d.high)} points ({p})."
    )


def _figures(pair: Pair) -> Table:
    """The scores of both arms and their differences."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name in ("", "A [95 %]", "B [95 %]", "A minus B, points [95 %]"):
        table.add_column(name, no_wrap=True)
    for name in ("deployed", "clean"):
        scores = [stats.score(getattr(side, name), collapsed=len(side.collapsed)) for side in (pair.new, pair.old)]
        difference: stats.Interval = getattr(pair.comparison, name)
        table.add_row(name, *(Text(words.score_text(s)) for s in scores), Text(words.effect_text(difference)))
    return table


def _basis(pair: Pair) -> str:
    """The runs, the pairing, the differing settings, and notes on the figures, one line each."""
    c = pair.comparison
    lines = [
        f"{letter}  {arm.runs[0].path.parent}, {_seeds(scores.seeds)}: {arm.experiment.title or arm.experiment.id}"
        for letter, arm, scores in (("A", pair.treatment, pair.new), ("B", pair.baseline, pair.old))
    ]
    kind = {
        "benefit": "the same hardware",
        "training": "deployed on the same hardware, trained on different arithmetic",
        "cost": "B on plain arithmetic",
    }[c.kind]
    how = "seed and problem" if pair.new.seeds == pair.old.seeds else "problem"
    lines.append(f"Paired by {how} over the same {words.number(c.problems, 'problem')}; {kind}.")
    if c.unpaired:
        lines.append(f"Left out: {words.number(c.unpaired, 'complete run')} without a partner of the same seed.")
    if not c.differs:
        lines.append("Their settings are equal.")
    elif len(c.differs) <= LISTED:
        lines.append(f"They differ in {', '.join(c.differs)}.")
    else:
        lines.append(f"They differ in {len(c.differs)} settings: {', '.join(c.differs[:LISTED])}, ...")
    for letter, arm in (("A", pair.treatment), ("B", pair.baseline)):
        lines += [f"{letter}, {line}." for line in arm_notes(arm)]
    if any(s.covers == "problems only" for s in (c.deployed, c.clean)):
        lines.append("† the interval carries the variance of problems only, not that of seeds.")
    if any(s.collapsed for s in (c.deployed, c.clean)):
        lines.append("‡ runs collapsed: the seeds are two groups, and the interval may cover less than 95 %.")
    return "\n".join(lines)


def _collapsed(pair: Pair) -> str:
    """A sentence after the answer that says which runs collapsed; empty if none did."""
    sides = (("A", pair.new.collapsed), ("B", pair.old.collapsed))
    parts = [f"{_seeds(seeds)} of {name}" for name, seeds in sides if seeds]
    return f" Collapsed: {' and '.join(parts)}, so that the mean is that of two groups." if parts else ""


def _equivalence(tests: stats.Equivalence) -> str:
    """The result of the tests against a margin, in a sentence."""
    margin = f"{100 * tests.margin:g} points"
    if tests.p_not_worse is None:
        return f"Whether A loses less than {margin} cannot be tested below three seeds."
    verb = "is" if tests.p_not_worse < 0.05 else "is not"
    text = f"That A loses less than {margin} {verb} shown (one-sided p {words.p_text(tests.p_not_worse)})"
    if tests.p_equivalent is not None and tests.p_equivalent < 0.05:
        text += f", and so is that it gains less than that (p {words.p_text(tests.p_equivalent)})"
    return text + "."


def _flips(pair: Pair) -> list[str]:
    """The result of McNemar's test for each pair of runs, and what it does not show."""
    lines = []
    for (a, b), flip in zip(zip(pair.new.seeds, pair.old.seeds, strict=True), pair.comparison.flips, strict=True):
        seeds = f"Seed {a}" if a == b else f"Seed {a} of A and seed {b} of B"
        verdict = "these two runs differ by more" if flip.p < 0.05 else "these two runs differ by no more"
        of = words.number(pair.comparison.problems, "problem")
        lines.append(
            f"{seeds}: A alone solves {flip.gained}, B alone {flip.lost} of {of} (exact McNemar test, p "
            f"{words.p_text(flip.p)}): {verdict} than chance on these problems would make them. "
            "This says nothing of other seeds."
        )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
