"""Reads a table of scores from elsewhere (CSV or Markdown), and says what can be concluded from its intervals.

Such a table has one score per experiment and no outcomes per problem, so only the sampling error of the test set can be
estimated: by Wilson's interval for a score, and by Newcombe's for a difference of independent proportions (Newcombe
1998, Statist. Med. 17:873, method 10). The true error is smaller if both arms were scored on the same problems, and
larger because seeds vary. A difference that exceeds this error is one that the test set alone does not explain.
`seed_limit` is how much seeds may vary before they explain it.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import stats as distributions

from roundoff import stats
from roundoff.config import ConfigError
from roundoff.report import words

NAMES = {
    "id": ("id", "name", "experiment", "run"),
    "score": ("score", "accuracy", "score_percent", "reference_score_percent", "reference_score"),
    "problems": ("n", "problems", "questions"),
    "baseline": ("baseline", "against"),
}
"""Headings by which each column is recognized, in any case."""
ALPHA = 0.05
"""p below which a difference exceeds its error."""


@dataclass(frozen=True)
class ImportedRow:
    """One score from elsewhere, with its difference to its baseline."""

    id: str
    score: stats.Interval | None
    """The score with Wilson's interval; None if the table has none."""
    baseline: str | None
    """Id of the baseline."""
    difference: stats.Interval | None
    """Difference to the baseline (fraction), whose interval carries the error of the test set only."""
    seed_limit: float | None
    """Largest standard deviation between seeds (fraction) at which the difference still exceeds its error."""
    no_difference: str
    """Why there is no difference; empty if there is one or there is no baseline."""
    p_holm: float | None = None
    """p-value of the difference, corrected over the table."""

    @property
    def exceeds_error(self) -> bool:
        """Whether the difference is larger than the test set explains, after correction over the table."""
        d = self.difference
        return d is not None and (d.low > 0 or d.high < 0) and self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """The conclusion in a few words."""
        d = self.difference
        if d is None:
            return self.no_difference
        if self.exceeds_error:
            return "exceeds the error of the test set"
        if d.low > 0 or d.high < 0:
            return "hint only: not after correction"
        return "within its error"


@dataclass(frozen=True)
class ImportedTable:
    """A table from elsewhere with its conclusions."""

    rows: tuple[ImportedRow, ...]

    @property
    def conclusion(self) -> str:
        """The conclusion in a few sentences."""
        compared = [row for row in self.rows if row.difference]
        if not compared:
            return "No row can be compared with a baseline that has a score."
        beyond = [row.id for row in compared if row.exceeds_error]
        ids = f": {', '.join(beyond)}" if beyond else ""
        if len(compared) == 1:
            exceeds = "exceeds" if beyond else "does not exceed"
            text = f"The only published difference {exceeds} the error of the test set{ids}."
        else:
            count = f"{len(beyond) or 'None'} of {len(compared):,} published differences"
            verb = "exceeds" if len(beyond) <= 1 else "exceed"
            text = f"{count} {verb} the error of the test set (corrected over the table){ids}."
        return f"{text} With one run per experiment, nothing shows how much another seed would change."


def read_table(path: Path, *, problems: int | None = None, baseline: str | None = None) -> ImportedTable:
    """The table in a CSV or Markdown file with the columns id and score, and optionally n and baseline.

    Scores are percent if any is above 1 or has a percent sign, and fractions otherwise.

    Args:
        path: the file.
        problems: number of test problems of rows that give no n.
        baseline: id of the baseline of rows that give none.

    Raises:
        ConfigError: if the file cannot be read, or a column, a number of problems or a score is missing or wrong.
    """
    cells = _cells(path)
    raw = [_number(row["score"], f"{path}, {row['id']}: score") for row in cells]
    percent = any(value is not None and value > 1 for value in raw) or any("%" in row["score"] for row in cells)
    scores: dict[str, stats.Interval | None] = {}
    for row, value in zip(cells, raw, strict=True):
        if row["id"] in scores:
            raise ConfigError(f"{path}: the id {row['id']!r} occurs twice in the table")
        scores[row["id"]] = None if value is None else _score(value / (100 if percent else 1), row, problems, path)
    if baseline is not None and baseline not in scores:
        raise ConfigError(f"{path}: there is no row {baseline!r} to compare with")
    rows = [_row(row, scores, baseline) for row in cells]
    adjusted = stats.holm([row.difference.p if row.difference else None for row in rows])
    return ImportedTable(tuple(replace(r, p_holm=p) for r, p in zip(rows, adjusted, strict=True)))


def imported_table(table: ImportedTable) -> RenderableType:
    """The table and its conclusion for a terminal."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name in ("Id", "Score [95 %]", "Against", "Points [95 %]", "p"):
        grid.add_column(name, no_wrap=name != "Id", justify="right" if name == "p" else "left")
    grid.add_column("Verdict", min_width=16)
    for row in table.rows:
        if row.score is not None:
            style = "bold" if row.exceeds_error else ""
            grid.add_row(*(Text(cell) for cell in _shown(row)), Text(row.verdict, style=style))
    absent = [row.id for row in table.rows if row.score is None]
    lines = [f"Without a score: {', '.join(absent)}.", ""] if absent else []
    lines += [table.conclusion, *(limit for row in table.rows if (limit := _seed_limit(row)))]
    return Group(grid, Text(""), Text("\n".join(lines)))


def _seed_limit(row: ImportedRow) -> str:
    """A line that says how much seeds may vary before they explain a difference that exceeds its error; else empty."""
    if not row.exceeds_error or row.seed_limit is None or row.difference is None:
        return ""
    return (
        f"- {row.id} against {row.baseline}, {words.points(row.difference.estimate)} points: still beyond error if "
        f"seeds vary by less than {100 * row.seed_limit:.1f} points (standard deviation)"
    )


def _shown(row: ImportedRow) -> tuple[str, ...]:
    """The cells of a row but for its verdict."""
    score, change = row.score, row.difference
    return (
        row.id,
        f"{words.percent(score.estimate)} [{100 * score.low:.1f}, {100 * score.high:.1f}]" if score else words.NONE,
        row.baseline or words.NONE,
        f"{words.points(change.estimate)} [{words.points(change.low)}, {words.points(change.high)}]"
        if change
        else words.NONE,
        words.p_text(row.p_holm),
    )


def _row(row: Mapping[str, str], scores: Mapping[str, stats.Interval | None], default: str | None) -> ImportedRow:
    """A row with its difference to its own baseline, or else to the default one."""
    against = row["baseline"] or (default if default != row["id"] else None)
    score, base = scores[row["id"]], scores.get(against) if against else None
    if against is None or score is None or base is None:
        reason = "" if against is None else "no score" if score is None else f"{against} has no score in this table"
        return ImportedRow(row["id"], score, against, None, None, reason)
    difference = stats.unpaired_difference(score, base)
    estimate = difference.estimate
    half = (difference.high - estimate) if estimate < 0 else (estimate - difference.low)
    room = estimate**2 - half**2
    # At the limit, estimate^2 = half^2 + (1.96 * sqrt(2) * seed)^2.
    limit = math.sqrt(room / 2) / float(distributions.norm.ppf(1 - ALPHA / 2)) if room > 0 else None
    return ImportedRow(row["id"], score, against, difference, limit, "")


def _score(value: float, row: Mapping[str, str], problems: int | None, path: Path) -> stats.Interval:
    """A score (fraction) with its interval."""
    own = _number(row["problems"], f"{path}, {row['id']}: n")
    n = int(own) if own is not None else problems
    if n is None or n < 1:
        raise ConfigError(f"{path}, {row['id']}: the number of problems is missing: add a column n, or give --n")
    if not 0 <= value <= 1:
        raise ConfigError(f"{path}, {row['id']}: score must be 0 to 100 % or a fraction, but is {row['score']}")
    return stats.proportion(value, n)


def _number(text: str, name: str) -> float | None:
    """The number in a cell, without Markdown or a percent sign; None if the cell is empty or a dash."""
    cleaned = text.strip().strip("*_`").rstrip("%").strip().replace(",", "" if re.search(r"\d,\d{3}$", text) else ".")
    if cleaned in ("", "-", words.NONE, "\N{EM DASH}", "n/a", "N/A"):
        return None
    try:
        value = float(cleaned)
    except ValueError:
        raise ConfigError(f"{name} must be a number, but is {text!r}") from None
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, but is {text!r}")
    return value


def _cells(path: Path) -> list[dict[str, str]]:
    """The rows of the file by the keys id, score, problems and baseline, with empty texts for absent cells."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines = _markdown(text) if path.suffix.lower() in (".md", ".markdown") else list(csv.reader(io.StringIO(text)))
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise ConfigError(f"{path} holds no table: it needs a heading with id and score, and rows below it")
    places = {key: _place(lines[0], names) for key, names in NAMES.items()}
    for key in ("id", "score"):
        if places[key] is None:
            heads = ", ".join(cell.strip() for cell in lines[0])
            raise ConfigError(f"{path} has no column {key} (one of {', '.join(NAMES[key])}); its columns are {heads}")
    return [
        {key: line[at].strip() if at is not None and at < len(line) else "" for key, at in places.items()}
        for line in lines[1:]
    ]


def _place(heads: Sequence[str], names: Sequence[str]) -> int | None:
    """Index of the column whose heading is one of the names; None if there is no such column."""
    cleaned = [re.sub(r"[^a-z0-9]+", "_", head.lower()).strip("_") for head in heads]
    return next((cleaned.index(name) for name in names if name in cleaned), None)


def _markdown(text: str) -> list[list[str]]:
    """The cells of the first Markdown table in a text."""
    lines = []
    for line in text.splitlines():
        if line.strip().startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                lines.append(cells)
        elif lines:
            break
    return lines
