"""Puts numbers and conclusions into words, which are the same in the page, the summary and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roundoff.report.compare import Comparison, Kind
from roundoff.report.contents import Report, Row
from roundoff.stats import MIN_SEEDS, Interval

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
LISTED = 3
"""Maximum number of effects of one kind that an answer lists one by one; if there are more, it counts them."""
KINDS: tuple[Kind, ...] = ("cost", "benefit", "training")
"""Kinds of comparison in the order in which an answer speaks of them."""
VERBS: Mapping[Kind, tuple[str, str]] = {
    "cost": ("gains", "costs"),
    "benefit": ("wins", "loses"),
    "training": ("wins", "loses"),
}
"""What an arm does to points if a difference of this kind is positive, or negative."""
GLOSSARY = {
    "rollout": "A sampled completion. A group is the rollouts of one prompt.",
    "hardware": "What the chip does to the arithmetic: precision, matmul noise, deadzone. Active in rollout, training "
    "and evaluation, each of which may have its own.",
    "matmul noise": "y + s·|y|·ε with ε ~ N(0, 1) on the output of every matrix product; s is given in percent.",
    "deployed score": "Accuracy on the hardware of evaluation, which is that of rollouts unless the settings say "
    "otherwise: the headline.",
    "clean score": "Accuracy of the same weights with the hardware off.",
    "start": "Deployed score before any training.",
    "cost": "Deployed score minus that of the same training on plain arithmetic.",
    "benefit": "Deployed score minus that of the declared baseline on the same hardware: what the remedy does.",
    "training": "Deployed score minus that of the declared baseline, which is deployed on the same hardware, but was "
    "trained on different arithmetic.",
    "interval": "The range that contains the mean over all seeds and all problems of this kind in 95 % of cases. With "
    "fewer than three seeds it carries problem variance only and is marked †.",
    "collapsed": "A run that ends below its start or at less than half the best score of its arm, and far below the "
    "arm's other runs. The seeds are then two groups: their mean describes neither, and the interval, marked ‡, may "
    "cover less than 95 %. An arm needs three runs for this to be noticed.",
    "hint": "A difference whose own interval excludes zero, but whose corrected p is not below 5 %. The effect is not "
    "shown, but there is a sign of it.",
    "p": "Probability of a difference at least this large if there were none, corrected over all comparisons of this "
    "report (Holm). Not given below three seeds.",
    "best": "Said only of an arm whose difference to every other scored arm of its family under the same profile and "
    "on the same hardware excludes zero.",
    "AQN": "Adaptive Quantization Noise: scheduled noise of standard deviation sigma on RMSNorm weights, in rollouts "
    "only.",
    "SRDD": "Static Relative Deadzone Detection: one scan that measures each layer's quantization error and turns it "
    "into per-layer multipliers of AQN, or into the layers to keep in high precision.",
    "importance ratio": "New over old probability of a sampled token. Its effective sample size falls where noise "
    "makes the two disagree.",
    "KL": "Kullback-Leibler divergence of the next-token distribution from that of the clean model (nats per token).",
    "published": "A score that others gave for an experiment of the same id. It is shown beside ours and used in no "
    "figure.",
    "flip": "A problem that one arm solves and the other does not.",
}
"""Terms of the report with their meaning, in the order of the glossary."""


@dataclass(frozen=True)
class Answer:
    """The question that one family of experiments asks, and the answer."""

    family: str
    asked: str
    """The question, as one sentence."""
    answer: str
    """The answer, as one sentence."""


def percent(value: float | None) -> str:
    """A fraction in percent, such as `64.3 %`; a dash for None."""
    return NONE if value is None else f"{100 * value:.1f} %"


def score_text(interval: Interval | None) -> str:
    """A score such as `64.3 % [61.0, 67.4]`, with the marks of its interval; a dash for None."""
    if interval is None:
        return NONE
    return f"{percent(interval.estimate)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]{marks(interval)}"


def marks(interval: Interval) -> str:
    """The marks of an interval: † below three seeds, ‡ if runs collapsed; empty without either."""
    return (" †" if interval.covers == "problems only" else "") + (" ‡" if interval.collapsed else "")


def bounds_text(interval: Interval) -> str:
    """The interval of a score in percent, such as `61.0 to 67.4`, with its marks."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}{marks(interval)}"


def effect_bounds_text(interval: Interval) -> str:
    """The interval of a difference in points, such as `−8.3 to −2.1`, with its marks."""
    return f"{points(interval.low)} to {points(interval.high)}{marks(interval)}"


def duration(seconds: float) -> str:
    """A time such as `45 s`, `12 min`, `2 h 20 min` or `614 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 6000:
        return f"{round(minutes / 60):,} h"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def points(value: float) -> str:
    """A difference in points, such as `+1.2` or `−1.2`, with a true minus sign and without a signed zero."""
    digits = f"{abs(100 * value):.1f}"
    sign = "" if float(digits) == 0 else "+" if value > 0 else MINUS
    return sign + digits


def effect_text(interval: Interval) -> str:
    """A difference in points, such as `−5.2 [−8.3, −2.1]`, with the marks of its interval."""
    return f"{points(interval.estimate)} [{points(interval.low)}, {points(interval.high)}]{marks(interval)}"


def p_text(p: float | None) -> str:
    """A p-value such as `0.03` or `< 0.001`; a dash for None."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def factors(values: Sequence[float]) -> str:
    """Factors by layer, with consecutive equal ones joined, such as `0-3: 1.5, 4-9: 1`; `1 everywhere` if empty."""
    if not values:
        return "1 everywhere"
    parts, start = [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or f"{values[i]:.3g}" != f"{values[start]:.3g}":
            layers = str(start) if i - 1 == start else f"{start}-{i - 1}"
            parts.append(f"{layers}: {values[start]:.3g}")
            start = i
    return ", ".join(parts)


def paired_text(comparison: Comparison) -> str:
    """The seeds over which two arms were compared, if these are not all that are complete; empty otherwise."""
    seeds = ", ".join(map(str, comparison.seeds))
    plural = "s" if len(comparison.seeds) > 1 else ""
    if comparison.baseline_seeds != comparison.seeds:
        return f"seed {seeds} with seed {', '.join(map(str, comparison.baseline_seeds))}, by problem alone"
    if comparison.unpaired:
        return f"over seed{plural} {seeds}: {number(comparison.unpaired, 'run')} without a partner"
    return ""


def best_text(rows: Sequence[Row]) -> str:
    """Which arm of a family is shown to be the best, or that none is; empty if fewer than two arms could be tested."""
    tested = [row for row in rows if row.deployed and row.deployed.seeds >= MIN_SEEDS]
    if len(tested) < 2:
        return ""
    best = [row for row in rows if row.is_best]
    if best:
        named = ", ".join(
            row.label + (f" ({collapsed_text(row.best_over_collapsed)})" if row.best_over_collapsed else "")
            for row in best
        )
        return f"best on {'its' if len(best) == 1 else 'their'} hardware: {named}"
    collapsed = sum(len(row.collapsed) for row in rows)
    note = f" ({collapsed_text(collapsed)})" if collapsed else ""
    return f"no arm is shown to be the best on its hardware{note}"


def collapsed_text(count: int) -> str:
    """`1 run collapsed` or `2 runs collapsed`."""
    return f"{number(count, 'run')} collapsed"


def best_mark(row: Row) -> str:
    """`best`, with the number of collapsed runs in the comparisons that show it; empty for any other arm."""
    if not row.is_best:
        return ""
    return f"best; {collapsed_text(row.best_over_collapsed)}" if row.best_over_collapsed else "best"


def collapse_lines(report: Report) -> list[str]:
    """A line for each run that collapsed, with its scores before and after training."""
    lines = []
    for row in report.rows:
        for seed in (seed for seed in row.seeds if seed.seed in row.collapsed):
            start = "" if seed.start is None else f", having started at {percent(seed.start)}"
            lines.append(f"{row.label}: seed {seed.seed} collapsed (deployed {percent(seed.deployed)}{start})")
    return lines


def seeds_text(row: Row) -> str:
    """The number of complete runs, such as `3`, or `2 of 3` if others began."""
    done = sum(seed.state == "complete" and not seed.untrained for seed in row.seeds)
    return str(done) if done == len(row.seeds) else f"{done} of {len(row.seeds)}"


def number(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun in the singular or plural, such as `1 run` or `1,024 problems`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def cell(text: object) -> str:
    """The text, escaped so that it cannot break out of a Markdown table cell or be read as HTML."""
    line = " ".join(str(text).split())
    for special, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*"), ("_", "\\_")):
        line = line.replace(special, escaped)
    return line


def answers(report: Report) -> tuple[Answer, ...]:
    """The question and the answer of every family, in order of appearance."""
    return tuple(
        Answer(family, _asked(rows), _answered([row for row in rows if row.comparison], rows))
        for family, rows in report.families.items()
    )


def overview(report: Report) -> str:
    """One line that says how many runs and experiments the report covers."""
    complete = sum(seed.state == "complete" for row in report.rows for seed in row.seeds)
    unfinished = report.runs - complete
    rest = f", {unfinished} of them without a final score" if unfinished else ""
    untrained = sum(bool(seed.untrained) for row in report.rows for seed in row.seeds)
    rest += f", {untrained} of them without any training" if untrained else ""
    missing = sum(not row.seeds for row in report.rows)
    absent = f"; {number(missing, 'declared experiment')} not run" if missing else ""
    return f"{number(report.runs, 'run')} of {number(len(report.rows) - missing, 'experiment')}{rest}{absent}"


def _asked(rows: Sequence[Row]) -> str:
    """The question that the comparisons of a family answer."""
    kinds = {row.comparison.kind for row in rows if row.comparison}
    question = {
        frozenset({"cost"}): "How much deployed accuracy does each hardware cost",
        frozenset({"benefit"}): "Does each remedy raise the deployed accuracy on the same hardware",
        frozenset({"cost", "benefit"}): "How much deployed accuracy does each hardware cost, and do the remedies help",
        frozenset({"training"}): "Does training on another arithmetic raise the deployed accuracy",
        frozenset({"cost", "training"}): "How much deployed accuracy does each hardware cost, and does training on "
        "another arithmetic help",
        frozenset({"benefit", "training"}): "Do the remedies, or training on another arithmetic, raise the deployed "
        "accuracy on the same hardware",
        frozenset({"cost", "benefit", "training"}): "How much deployed accuracy does each hardware cost, and do the "
        "remedies, or training on another arithmetic, help",
    }.get(frozenset(kinds), "What deployed accuracy does each experiment reach")
    scored = [row for row in rows if row.deployed]
    if not scored:
        return f"{question}?"
    models = ", ".join(dict.fromkeys(row.settings.model for row in scored))
    tasks = ", ".join(dict.fromkeys(row.settings.task for row in scored))
    seeds = sorted({row.deployed.seeds for row in scored if row.deployed})
    problems = sorted({row.deployed.problems for row in scored if row.deployed})
    return (
        f"{question}, for model {models} on {tasks} ({_span(seeds)} seed{'' if seeds == [1] else 's'}, "
        f"{_span(problems)} problems)?"
    )


def _span(values: Sequence[int]) -> str:
    """The range of ascending values."""
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def _answered(compared: Sequence[Row], rows: Sequence[Row]) -> str:
    """The answer of a family: its effects, or its scores if nothing was compared."""
    if not compared:
        scored = [row for row in rows if row.deployed]
        if not scored:
            return "No run of this family is complete yet."
        if len(scored) > LISTED:
            low, high = (f(row.deployed.estimate for row in scored if row.deployed) for f in (min, max))
            return f"{len(scored)} experiments score between {percent(low)} and {percent(high)}; none was compared."
        return "; ".join(f"{row.name}: {score_text(row.deployed)}{_untrained(row)}" for row in scored) + "."
    parts = []
    for kind in KINDS:
        mine = [(row, row.comparison) for row in compared if row.comparison and row.comparison.kind == kind]
        if 0 < len(mine) <= LISTED:
            parts += [effect_sentence(row, comparison) for row, comparison in mine]
        elif mine:
            parts.append(_counted(mine))
    return "; ".join(parts) + "."


def _untrained(row: Row) -> str:
    """A note for a score that is not a result of training; empty for any other."""
    count = sum(bool(seed.untrained) for seed in row.seeds)
    return f" (nothing was trained in {count} of {number(len(row.seeds), 'run')})" if count else ""


def effect_sentence(row: Row, comparison: Comparison) -> str:
    """An effect in words, such as `10 % matmul noise: costs 5.2 points (2.1 to 8.3)`, without a full stop."""
    effect = comparison.deployed
    size = f"{abs(100 * effect.estimate):.1f} points"
    if comparison.is_shown:
        bounds = sorted((abs(100 * effect.low), abs(100 * effect.high)))
        verb = VERBS[comparison.kind][effect.estimate < 0]
        note = f"; {collapsed_text(effect.collapsed)}" if effect.collapsed else ""
        return f"{row.name}: {verb} {size} ({bounds[0]:.1f} to {bounds[1]:.1f}{note})"
    if effect.p is None:
        side = "below" if effect.estimate < 0 else "above"
        return f"{row.name}: {size} {side} its baseline ({comparison.verdict})"
    between = f"{points(effect.low)} to {points(effect.high)}"
    return f"{row.name}: {comparison.verdict} ({points(effect.estimate)} points, {between})"


def _counted(mine: Sequence[tuple[Row, Comparison]]) -> str:
    """The effects of one kind, counted by their outcome."""
    kind = mine[0][1].kind
    shown = [(row, c) for row, c in mine if c.is_shown]
    tested = [c for _, c in mine if c.deployed.p is not None]
    nouns = {"cost": "hardware settings", "benefit": "remedies", "training": "trainings on another arithmetic"}[kind]
    if not tested:
        return f"{len(mine)} {nouns} were run, none with the three seeds that a test needs"
    down = [(row, c) for row, c in shown if c.deployed.estimate < 0]
    up = [(row, c) for row, c in shown if c.deployed.estimate > 0]
    words = ("cost accuracy", "gain accuracy") if kind == "cost" else ("hurt", "help")
    parts = []
    for effects, word in ((down, words[0]), (up, words[1])):
        if effects:
            row, most = max(effects, key=lambda pair: abs(pair[1].deployed.estimate))
            parts.append(f"{len(effects)} {word}, most of all {row.name} ({points(most.deployed.estimate)} points)")
    hints = sum(c.outcome == "hint" for c in tested)
    rest = sum(c.outcome == "not shown" for c in tested)
    parts += [f"{hints} {'is a hint' if hints == 1 else 'are hints'} only"] if hints else []
    parts += [f"{rest} show no effect beyond their error"] if rest else []
    untested = len(mine) - len(tested)
    parts += [f"{untested} not testable"] if untested else []
    collapsed = sum(bool(c.deployed.collapsed) for _, c in mine)
    parts += [f"with collapsed runs in {collapsed} of the comparisons"] if collapsed else []
    return f"of {len(tested)} {nouns} tested, " + ", ".join(parts)
