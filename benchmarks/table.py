"""Tables of docs/results-tiny.md from run directories: `python -m benchmarks.table RUNS... --out FILE`.

Scores, intervals and verdicts are those of `roundoff report`; what stands outside of the two markers in the file is
left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from roundoff.aqn.multipliers import MODES
from roundoff.experiments import families, load_experiment, reference_scores
from roundoff.report import words
from roundoff.report.arms import Arm, group_arms
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report, Row
from roundoff.runs.files import write_atomic
from roundoff.runs.record import Run, find_runs
from roundoff.srdd import METRICS, LayerScan, rank_correlation
from roundoff.training.before_first_step import measure_aqn
from roundoff.training.preparation import prepare

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
DEFAULT_ROOT = Path("runs")
SHOWN_METRICS = ("relative_error", "gradient", "shadow", "energy_error")
RATIO_METRICS = {"ratio_std": "spread of the ratio", "ratio_ess": "effective sample size", "clip_fraction": "clipped"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, and an empty line."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(cells) + " |" for cells in rows)
    yield ""


def sources(report: Report, runs: Sequence[Run]) -> Iterator[str]:
    seconds = [run.status.seconds for run in runs if run.is_final]
    yield f"{words.overview(report)}; {sum(seconds) / 3600:.1f} h of work in all, {fmean(seconds):.0f} s a run."
    yield ""
    for commit, machine, versions in dict.fromkeys((s.commit, s.machine, s.versions) for s in report.sources):
        yield f"- commit {commit}, {machine}, {versions}"
    yield ""


def scores(rows: Sequence[Row]) -> Iterator[str]:
    """The arms of one family."""

    def cells(row: Row) -> list[str]:
        c = row.comparison
        return [
            f"`{row.id}`",
            words.cell(row.title),
            words.seeds_text(row),
            words.percent(row.start),
            words.score_text(row.deployed),
            words.score_text(row.clean),
            f"`{row.baseline}`" if row.baseline else "",
            words.effect_text(c.deployed) if c else "",
            words.p_text(c.p_holm) if c else "",
            c.verdict if c else words.cell(row.no_comparison),
        ]

    head = (
        "id",
        "what",
        "seeds",
        "start",
        "deployed [95 %]",
        "clean [95 %]",
        "against",
        "points [95 %]",
        "p",
        "verdict",
    )
    yield from table(head, map(cells, rows))


def remedies(report: Report, arms: dict[str, Arm]) -> Iterator[str]:
    """AQN's benefit, with what its largest sigma did before training."""
    found = [row for row in report.rows if row.id in arms and arms[row.id].experiment.aqn and row.comparison]

    def cells(row: Row) -> list[str]:
        assert row.comparison is not None
        flight = before_training(arms[row.id].runs[0])
        chip = flight["hardware_kl"]
        return [
            f"`{row.id}`",
            words.cell(row.settings.aqn),
            f"{flight['kl']:.3g}",
            "" if chip is None else f"{chip:.3g}",
            words.effect_text(row.comparison.deployed),
            words.p_text(row.comparison.p_holm),
            row.comparison.verdict,
        ]

    head = ("id", "AQN", "KL of AQN", "KL of the hardware", "points [95 %]", "p", "verdict")
    yield from table(head, map(cells, found))
    verdicts = [row.comparison.verdict for row in found if row.comparison]
    counted = ", ".join(f"{verdicts.count(verdict)} x {verdict}" for verdict in dict.fromkeys(verdicts))
    yield f"Of {len(found)} remedies: {counted}."
    yield "KL to the clean model in nats per token, before training, first seed; that of AQN at its largest sigma."
    yield ""


def before_training(run: Run) -> dict[str, Any]:
    """The run's pre-flight; measured now for a run that was made before there was one."""
    if run.preflight is not None:
        return run.preflight
    scan = None if run.scan is None else LayerScan.from_json(run.scan)
    measured = measure_aqn(prepare(run.experiment, run.profile, run.seed, scan=scan))
    assert measured is not None
    return measured.to_json()


def scans(runs: Sequence[Run]) -> Iterator[str]:
    """Damage of each layer and what the modes make of it, for each different scan."""
    found: dict[str, LayerScan] = {}
    users: dict[str, set[str]] = {}
    for run in runs:
        if (content := run.scan) is not None:
            scan = LayerScan.from_json(content)
            key = f"{scan.hardware.model_dump_json()} {scan.rank_by} {scan.values()}"
            found.setdefault(key, scan)
            users.setdefault(key, set()).add(run.experiment.id)
    for key, scan in found.items():
        precision = scan.hardware.precision
        names = [name for name in SHOWN_METRICS if name in scan.metric_names()]
        modes = {mode: scan.multipliers(mode) for mode in MODES}
        yield (
            f"{scan.tokens} tokens, weights {precision.weight}, activations {precision.activation}, ranked by "
            f"{METRICS[scan.rank_by].title}; used by {', '.join(f'`{name}`' for name in sorted(users[key]))}:"
        )
        yield ""
        yield from table(
            ("layer", *(METRICS[name].title for name in names), *modes),
            (
                (
                    str(row.layer),
                    *(f"{getattr(row, name):.3g}" for name in names),
                    *(f"{factors[row.layer]:.3g}" for factors in modes.values()),
                )
                for row in scan.layers
            ),
        )
        agreement = ", ".join(f"{METRICS[n].title} {_shown(scan.agreement(n))}" for n in names)
        pair = rank_correlation(list(scan.damage("relative_error").values()), list(scan.damage("gradient").values()))
        yield f"Rank correlation of the two halves of the text: {agreement}."
        yield f"Of the classic with the gradient score: {_shown(pair)}. `zone` is that of the first half of a run."
        yield ""


def ratios(arms: dict[str, Arm]) -> Iterator[str]:
    """What the importance ratio did over training, by hardware and mode."""
    rows = []
    for name in families()["ratio"]:
        if name not in arms:
            continue
        steps = [step for run in arms[name].final for step in run.metrics if step.get("trained")]
        middle = [median(step[key] for step in steps) if steps else float("nan") for key in RATIO_METRICS]
        _, hardware, mode = name.split("-")
        rows.append((hardware, f"`{mode}`", *(f"{value:.4g}" for value in middle)))
    yield from table(("hardware", "ratio", *RATIO_METRICS.values()), rows)


def published(report: Report) -> Iterator[str]:
    """Differences as published (one run each, 1.5 B model) beside those measured here."""
    known = reference_scores()

    def cells(row: Row) -> list[str] | None:
        if row.comparison is None or row.id not in known or row.baseline not in known:
            return None
        there = known[row.id].score_percent - known[row.baseline].score_percent
        here = words.effect_text(row.comparison.deployed)
        return [f"`{row.id}`", f"`{row.baseline}`", words.points(there / 100), here, row.comparison.verdict]

    head = ("id", "against", "published (points)", "measured here (points) [95 %]", "verdict here")
    yield from table(head, filter(None, map(cells, report.rows)))


def document(roots: Sequence[Path]) -> str:
    """All tables.

    Raises:
        ValueError: if there is no complete run.
    """
    torch.set_num_threads(1)
    runs, skipped = find_runs(roots)
    if not any(run.is_final for run in runs):
        raise ValueError(f"there is no complete run in {', '.join(map(str, roots))}")
    present = {run.experiment.family for run in runs}
    declared = [load_experiment(name) for family, ids in families().items() if family in present for name in ids]
    report = build_report(runs, skipped, declared)
    arms = {arm.experiment.id: arm for arm in group_arms(runs)[0]}
    lines = list(sources(report, runs))
    for family, rows in report.families.items():
        lines += [f"## `{family}`", "", *scores(rows)]
        if family == "ratio":
            lines += [
                "Medians over steps and seeds; ratio and sample size at the first minibatch of each step:",
                "",
                *ratios(arms),
            ]
    lines += ["## AQN: benefit against the same hardware without it", "", *remedies(report, arms)]
    lines += ["## The scan that aims it", "", *scans(runs)]
    lines += ["## Beside the published differences", "", *published(report)]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return words.NONE if value is None else f"{value:.2f}"


def command_line(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """The directories among the arguments, and the page after `--out`; None without one."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
    return [Path(a) for a in arguments if not a.startswith("--") and (out is None or Path(a) != out)], out


def put(content: str, out: Path | None) -> None:
    """Print the content, or put it between the markers of a page.

    Raises:
        SystemExit: if the page lacks the markers.
    """
    if out is None:
        print(content)
        return
    before, begin, rest = out.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{out} lacks the lines {BEGIN} and {END}")
    write_atomic(out, f"{before}{BEGIN}\n\n{content}\n{END}{after}")


def main() -> None:
    """Print the tables, or put them between the markers of the file after `--out`."""
    roots, out = command_line(sys.argv[1:] if sys.argv[0].endswith("table.py") else [])
    put(document(roots or [DEFAULT_ROOT]), out)


if __name__ == "__main__":
    main()
