"""Collapsed runs and hints are marked wherever a score or a difference is printed."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from roundoff.planning.seeds import measured_variance
from roundoff.report import words
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.report.pair import find_arm, make_pair, pair_text
from roundoff.report.render import as_json, markdown, page, table_csv, terminal_table
from roundoff.runs.record import find_runs
from tests.simulated import experiment, write_run


def printed(content: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(content)
    return console.export_text()


def arms(root: Path, *, lost: tuple[float, ...], seeds: int = 3, gain: float = 0.0) -> Report:
    """`plain`, and on the same hardware `aqn`, each of whose seeds loses a share of what `plain` solves."""
    rng = np.random.default_rng(0)
    noisy = {"matmul_noise": {"relative_std": 0.1}}
    for seed in range(seeds):
        plain = (rng.random(400) < 0.7).astype(float)
        write_run(root, experiment("plain", family="f", hardware=noisy), seed, plain, plain)
        treated = plain * (rng.random(400) >= lost[seed % len(lost)])
        treated = np.maximum(treated, rng.random(400) < gain)
        aqn = {"sigma_start": 0.05, "sigma_end": 0.0005}
        write_run(root, experiment("aqn", family="f", baseline="plain", hardware=noisy, aqn=aqn), seed, treated, plain)
    return build_report(find_runs([root])[0])


def test_every_interval_is_marked_where_a_run_collapsed(tmp_path: Path) -> None:
    report = arms(tmp_path, lost=(0.0, 0.0, 0.97))
    row = next(row for row in report.rows if row.id == "aqn")
    assert row.collapsed == (2,)
    assert row.comparison and row.deployed and row.clean
    assert row.comparison.verdict == "no benefit shown (1 run collapsed)"
    for text in (
        words.score_text(row.deployed),
        words.score_text(row.clean),
        words.effect_text(row.comparison.deployed),
    ):
        assert text.endswith(" ‡")
    for text in (printed(terminal_table(report)), markdown(report), page(report)):
        assert "1 run collapsed" in text and "‡" in text
        assert "seed 2 collapsed (deployed" in text.replace("\\", "")
        assert "two groups" in text
    (data,) = [r for r in as_json(report)["rows"] if r["id"] == "aqn"]
    assert data["collapsed"] == (2,) and data["deployed"]["collapsed"] == 1
    assert data["comparison"]["deployed"]["collapsed"] == 1 and data["comparison"]["outcome"] == "not shown"
    (line,) = [r for r in csv.DictReader(io.StringIO(table_csv(report))) if r["id"] == "aqn"]
    assert (line["collapsed"], line["collapsed_compared"], line["outcome"]) == ("1", "1", "not shown")
    pair = make_pair(find_arm("aqn", tmp_path), find_arm("plain", tmp_path), margin=None)
    text = " ".join(printed(pair_text(pair)).split())
    assert "Collapsed: seed 2 of A" in text and "‡ runs collapsed" in text
    assert "among them are collapsed runs (1" in measured_variance(find_runs([tmp_path])[0]).source


def test_the_best_arm_is_marked_where_its_rival_collapsed(tmp_path: Path) -> None:
    healthy = arms(tmp_path / "one", lost=(0.45,), seeds=10)
    best = next(row for row in healthy.rows if row.id == "plain")
    assert best.is_best and words.best_mark(best) == "best"
    collapsed = arms(tmp_path / "two", lost=(*[0.45] * 9, 0.99), seeds=10)
    best = next(row for row in collapsed.rows if row.id == "plain")
    assert best.is_best and words.best_mark(best) == "best; 1 run collapsed"
    for text in (printed(terminal_table(collapsed)), markdown(collapsed), page(collapsed)):
        assert "best; 1 run collapsed" in text
    assert words.best_text(collapsed.rows) == "best on its hardware: plain (1 run collapsed)"


def test_healthy_runs_are_not_marked(tmp_path: Path) -> None:
    report = arms(tmp_path, lost=(0.1,))
    assert "collapsed" not in printed(terminal_table(report)) + markdown(report) + table_csv(report).split("\n", 1)[1]
    assert "‡" not in page(report).split('id="glossary"')[0]


def test_hints_are_counted_apart(tmp_path: Path) -> None:
    """In two of five tests, only the interval of the test itself excludes zero."""
    rng = np.random.default_rng(9)
    plain = (rng.random((3, 400)) < 0.8).astype(float)
    for seed in range(3):
        write_run(tmp_path, experiment("plain", family="f"), seed, plain[seed], plain[seed])
        for i, loss in enumerate((0.0, 0.5, 0.02, 0.02, 0.03)):
            noise = {"matmul_noise": {"relative_std": 0.1 + i / 100}}
            what = experiment(f"n{i}", family="f", baseline="plain", hardware=noise)
            worse = plain[seed] * (rng.random(400) >= loss)
            write_run(tmp_path, what, seed, worse, plain[seed])
    report = build_report(find_runs([tmp_path])[0])
    outcomes = [row.comparison.outcome for row in report.rows if row.comparison]
    hints = outcomes.count("hint")
    assert hints and outcomes.count("not shown")
    (answer,) = words.answers(report)
    assert f"{hints} {'is a hint' if hints == 1 else 'are hints'} only" in answer.answer
    assert f"{outcomes.count('not shown')} show no effect beyond their error" in answer.answer
    data = as_json(report)["rows"]
    assert [row["comparison"]["outcome"] for row in data if row["comparison"]] == outcomes


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_runs_nothing_is_called_collapsed(tmp_path: Path, seeds: int) -> None:
    report = arms(tmp_path, lost=(0.97, 0.0), seeds=seeds)
    assert all(not row.collapsed for row in report.rows)
    assert [row.comparison.outcome for row in report.rows if row.comparison] == ["not testable"]
