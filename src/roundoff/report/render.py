"""Writes a report as `summary.md`, `results.csv`, `results.json` and `report.html`, and as a table for a terminal.

The page is a single file: it contains its style, script and plots, a content security policy forbids any request, and
every text that comes from a run is escaped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roundoff import __version__
from roundoff.report import plots, published, words
from roundoff.report.contents import Report, Row
from roundoff.report.scan_picture import scan_picture
from roundoff.runs.files import write_atomic
from roundoff.runs.strict_json import finite_or_null

COLUMNS = (
    *("family", "id", "title", "profile", "model", "task", "algorithm", "epochs", "lora", "weight_format"),
    *(
        "activation_format",
        "gradient_format",
        "kv_cache_format",
        "attention_format",
        "keep",
        "matmul_noise",
        "other_hardware",
        "aqn",
        "aqn_layers",
        "srdd",
        "ratio",
        "other",
    ),
    *("seeds", "problems", "start", "deployed", "deployed_low", "deployed_high", "clean", "clean_low", "clean_high"),
    *("interval_covers", "truncated", "baseline", "kind", "difference", "difference_low", "difference_high", "p"),
    *("p_holm", "tests", "outcome", "verdict", "clean_difference", "best", "collapsed", "collapsed_compared", "status"),
    *("published_score", "published_label"),
    *("nonfinite", "reward_error", "empty", "untrained_runs", "notes"),
)
"""Columns of results.csv; scores and differences are fractions."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters that make spreadsheets take a text for a formula if it begins with one of them."""
SETTINGS = (
    ("Algorithm", "algorithm"),
    ("Epochs", "epochs"),
    ("LoRA", "lora"),
    ("Formats", "formats"),
    ("High precision", "keep"),
    ("Matmul noise", "matmul_noise"),
    ("Other hardware", "other_hardware"),
    ("AQN (sigma)", "sigma"),
    ("SRDD", "srdd"),
    ("Ratio", "ratio"),
    ("Other settings", "other"),
    ("Profile", "profile"),
)
"""Columns of settings in the page's complete table, each with the attribute of `SettingsInWords` that it shows."""
SHOWN_IF_SET = {"keep", "other", "other_hardware", "matmul_noise"}
"""Columns that are left out if no experiment sets them."""
SHOWN_IF_DIFFERENT = {"ratio", "profile"}
"""Columns that are left out if all experiments agree."""


def write_report(report: Report, out: Path) -> list[Path]:
    """Write the four files into `out`, each completely or not at all, and return their paths."""
    contents = {
        "summary.md": markdown(report),
        "results.csv": table_csv(report),
        "results.json": json.dumps(finite_or_null(as_json(report)), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n",
        "report.html": page(report),
    }
    for name, content in contents.items():
        write_atomic(out / name, content)
    return [out / name for name in contents]


def page(report: Report) -> str:
    """The self-contained page in HTML."""
    environment = _environment(autoescape=True)
    template = files("roundoff.report") / "templates"
    present = {name: tuple(row for row in rows if row.seeds) for name, rows in report.families.items()}
    present = {name: rows for name, rows in present.items() if rows}
    return environment.get_template("report.html.j2").render(
        **_context(report),
        style=Markup((template / "style.css").read_text("utf-8")),
        script=Markup((template / "script.js").read_text("utf-8")),
        columns=[(name, key) for name, key in SETTINGS if _is_shown(key, report.rows)],
        scans=[(scan, Markup(scan_picture(scan.content, scan.title, standalone=False))) for scan in report.scans],
        present=present,
        score_forest=plots.score_forest(report.rows),
        effect_forest=plots.effect_forest(report.rows),
        learning={name: plots.learning_charts(rows) for name, rows in present.items()},
        sigma={name: plots.sigma_chart(rows) for name, rows in present.items()},
        diagnostics={
            name: (
                ("Diagnostics of training", plots.diagnostic_charts(rows)),
                ("Corrections of rollouts", plots.correction_charts(rows)),
            )
            for name, rows in present.items()
        },
        legend=plots.legend,
        box=plots.BOX,
    )


def _is_shown(key: str, rows: Sequence[Row]) -> bool:
    """Whether a column of settings is worth showing."""
    values = {getattr(row.settings, key) for row in rows if row.seeds or key != "profile"}
    return len(values) > 1 if key in SHOWN_IF_DIFFERENT else key not in SHOWN_IF_SET or any(values)


def markdown(report: Report) -> str:
    """The summary in Markdown."""
    environment = _environment(autoescape=False)
    environment.filters["cell"] = words.cell
    return environment.get_template("summary.md.j2").render(**_context(report))


def table_csv(report: Report) -> str:
    """The table in CSV: one line per arm, with every setting and score."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow({k: _plain(v) for k, v in flat(row).items()})
    return buffer.getvalue()


def flat(row: Row) -> dict[str, Any]:
    """A row as the columns of results.csv; a column without a value is None or absent."""
    settings, effect, comparison = asdict(row.settings), row.comparison and row.comparison.deployed, row.comparison
    values: dict[str, Any] = {
        **{name: settings[name] for name in COLUMNS if name in settings},
        "family": row.family,
        "id": row.id,
        "title": row.title,
        "seeds": row.deployed.seeds if row.deployed else 0,
        "problems": row.deployed.problems if row.deployed else None,
        "start": row.start,
        "interval_covers": row.deployed.covers if row.deployed else None,
        "truncated": row.truncated,
        "baseline": row.baseline,
        "verdict": comparison.verdict if comparison else row.no_comparison,
        "best": row.is_best,
        "collapsed": len(row.collapsed) if row.deployed else None,
        "status": row.status,
        "untrained_runs": sum(bool(seed.untrained) for seed in row.seeds),
        "notes": "; ".join(row.notes),
    }
    if row.flaws:
        values |= {name: row.flaws.shares()[name] for name in ("nonfinite", "reward_error", "empty")}
    if row.published:
        values |= {"published_score": row.published.score.estimate, "published_label": row.published.label}
    for name, interval in (("deployed", row.deployed), ("clean", row.clean), ("difference", effect)):
        if interval:
            values |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    if comparison and effect:
        values |= {"kind": comparison.kind, "p": effect.p, "p_holm": comparison.p_holm, "tests": comparison.tests}
        values["clean_difference"] = comparison.clean.estimate
        values |= {"outcome": comparison.outcome, "collapsed_compared": effect.collapsed}
    return values


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as plain data; scores are fractions, not percent."""
    rows = []
    for row in report.rows:
        content = asdict(row)
        if row.comparison:
            c = row.comparison
            content["comparison"] |= {"verdict": c.verdict, "is_shown": c.is_shown, "outcome": c.outcome}
        rows.append(content)
    return {
        "roundoff": __version__,
        "overview": words.overview(report),
        "answers": [asdict(answer) for answer in words.answers(report)],
        "tests": report.tests,
        "updated": report.updated,
        "rows": rows,
        "scans": [asdict(scan) for scan in report.scans],
        "sources": [asdict(source) for source in report.sources],
        "skipped": list(report.skipped),
    }


def terminal_table(report: Report) -> RenderableType:
    """Scores, comparisons and answers for a terminal of at least 80 columns."""
    parts: list[RenderableType] = [_score_table(report)]
    if any(row.baseline and row.seeds for row in report.rows):
        parts.append(_effect_table(report))
    for answer in words.answers(report):
        family = (f"{answer.family}: ", "bold") if answer.family else ""
        parts.append(Text.assemble(family, (answer.asked, "dim"), "\n", answer.answer))
    notes = [f"{row.label}: {row.status}" for row in report.rows if row.seeds and not row.is_whole]
    notes += [f"{row.label}: {line}" for row in report.rows for line in row.notes]
    missing = [row.id for row in report.rows if not row.seeds]
    notes += [f"not run: {', '.join(missing)}"] if missing else []
    notes += words.collapse_lines(report)
    notes += [f"skipped: {line}" for line in report.skipped]
    parts += [Text("\n".join(notes), style="yellow")] if notes else []
    if any(row.deployed and row.deployed.covers == "problems only" for row in report.rows):
        parts.append(Text("† below three seeds: the interval carries problem variance only", style="dim"))
    if any(row.deployed and row.deployed.collapsed for row in report.rows):
        parts.append(
            Text("‡ runs collapsed: the seeds are two groups, and the interval may cover less than 95 %", "dim")
        )
    return Group(*(line for part in parts for line in (part, Text(""))))


def _score_table(report: Report) -> Table:
    """The table of scores."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("Experiment")
    for name in ("Seeds", "Start"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Deployed [95 %]", no_wrap=True)
    table.add_column("Clean", justify="right", no_wrap=True)
    for family, rows in report.families.items():
        if len(report.families) > 1:
            table.add_row(Text(family or "no family", style="italic"))
        for row in (row for row in rows if row.seeds):
            table.add_row(
                Text.assemble(
                    row.label,
                    f" ({words.best_mark(row)})" if row.is_best else "",
                    (f"\n{row.title}" if row.title else "", "dim"),
                ),
                Text(words.seeds_text(row)),
                Text(words.percent(row.start)),
                Text(words.score_text(row.deployed), style="bold"),
                Text(words.percent(row.clean.estimate if row.clean else None)),
            )
    return table


def _effect_table(report: Report) -> Table:
    """The table of differences to the declared baselines."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("Difference")
    table.add_column("Points [95 %]", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("Verdict", min_width=14)
    for row in (row for row in report.rows if row.seeds):
        over = words.paired_text(row.comparison) if row.comparison else ""
        name = Text.assemble(row.label, (f" against {row.against}" + (f" ({over})" if over else ""), "dim"))
        if row.comparison:
            effect, shown = row.comparison.deployed, row.comparison.is_shown
            style = ("green" if effect.estimate > 0 else "red") if shown else ""
            cells = (words.effect_text(effect), words.p_text(row.comparison.p_holm), row.comparison.verdict)
            table.add_row(name, *(Text(cell, style=style) for cell in cells))
        elif row.baseline:
            table.add_row(name, words.NONE, words.NONE, Text(row.no_comparison, style="yellow"))
    return table


def _context(report: Report) -> dict[str, Any]:
    """The variables that both templates use."""
    return {
        "report": report,
        "version": __version__,
        "answers": words.answers(report),
        "overview": words.overview(report),
        "glossary": words.GLOSSARY,
        "words": words,
        "published_setting": published.SETTING,
    }


def _environment(*, autoescape: bool) -> jinja2.Environment:
    """Where templates are found, and how they are read."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("roundoff.report"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _plain(value: Any) -> Any:
    """A cell of results.csv: a number with six decimals, or six digits if it is small; a text that is not a formula."""
    if isinstance(value, float):
        return round(value, 6) if abs(value) >= 1e-3 or not value else float(f"{value:.6g}")
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return "" if value is None else value
