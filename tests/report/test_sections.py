"""Sections of the page besides the scores: published scores, AQN's settings, scans, experiments that were not run."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from roundoff.report import plots, published, words
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.report.curves import Curve
from roundoff.report.render import flat, markdown, page, terminal_table
from roundoff.runs.record import find_runs
from tests.simulated import experiment, write_run

NOISE = {"matmul_noise": {"relative_std": 0.05}}
AQN = {"sigma_start": 0.05, "sigma_end": 0.0005}
HOSTILE = "<script>alert(3)</script>"
METRIC = {"title": "gradient score", "unit": "nats", "meaning": "m", "classic": False, "decibel": False}


def scan(**changes: object) -> dict[str, object]:
    """A scan of three layers as `LayerScan.to_json` writes it, as far as the report reads it."""
    layers = [{"layer": i, "gradient": 0.1 * (3 - i)} for i in range(3)]
    head = {"metrics": {"gradient": METRIC}, "layers": layers, "ranking": [0, 1, 2], "rank_by": "gradient"}
    return {**head, "tokens": 2048, "agreement": {"gradient": 0.9}, "warnings": [], **changes}


def declared(root: Path, *, seeds: int = 3, scans: dict[str, dict[str, object]] | None = None) -> Report:
    """Simulated runs under ids of the declared table: Baseline, E5 and E5b, but not E9b."""
    rng = np.random.default_rng(0)
    arms = [
        experiment("Baseline", title="Plain arithmetic", family="hardware"),
        experiment("E5", title="5 % matmul noise", family="hardware", baseline="Baseline", hardware=NOISE),
        experiment("E5b", title="AQN", family="hardware", baseline="E5", hardware=NOISE, aqn=AQN),
    ]
    for arm in arms:
        for seed in range(seeds):
            solved = (rng.random(150) < 0.6).astype(float)
            path = write_run(root, arm, seed, solved, solved)
            if scans and arm.id in scans:
                (path / "scan.json").write_text(json.dumps(scans[arm.id]), "utf-8")
    absent = experiment("E9b", title="not run", family="hardware", baseline="E5", hardware=NOISE, aqn=AQN)
    return build_report(*find_runs([root]), [*arms, absent])


def test_published_scores_stand_beside_ours_with_the_error_of_their_test_set(tmp_path: Path) -> None:
    """E5: 68.92 % of 1,319; its baseline 76.88 %; Newcombe's interval of the difference as `import-table` prints it."""
    report = declared(tmp_path)
    row = next(row for row in report.rows if row.id == "E5")
    assert row.published and row.published.difference
    assert row.published.label == "HW_5pct_noise_only_68.92"
    assert words.score_text(row.published.score) == "68.9 % [66.4, 71.4] †"
    assert words.effect_text(row.published.difference) == "−8.0 [−11.3, −4.6] †"
    html = page(report)
    assert "Published scores, for reference" in html and "HW_5pct_noise_only_68.92" in html
    assert flat(row)["published_score"] == pytest.approx(0.6892)
    assert "68.9 % [66.4, 71.4] †" in markdown(report)


def test_no_figure_is_computed_from_a_published_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_them = declared(tmp_path)
    monkeypatch.setattr(published, "reference_scores", dict)
    without = build_report(*find_runs([tmp_path]))
    ours = [row for row in with_them.rows if row.seeds]
    assert [replace(row, published=None) for row in ours] == list(without.rows)
    assert all(row.published for row in with_them.rows)
    assert "Published scores" not in page(without)


def test_aqn_is_shown_as_configured_and_as_injected(tmp_path: Path) -> None:
    """`write_run` injects no noise in steps 1 to 4 of 40, and then 0.05 * 0.01^(stage / 9)."""
    row = next(row for row in declared(tmp_path).rows if row.id == "E5b")
    assert row.aqn is not None
    assert (row.aqn.sigma_start, row.aqn.schedule, row.aqn.stages, row.aqn.layers) == (0.05, "epoch", 10, "all")
    assert (row.aqn.noisy_steps, row.aqn.steps) == (36, 40)
    assert row.aqn.highest == pytest.approx(0.05 * 0.01 ** (1 / 9))
    assert row.aqn.lowest == pytest.approx(0.0005)
    assert row.aqn.multipliers == ()


def test_factors_of_equal_layers_are_put_together() -> None:
    assert words.factors(()) == "1 everywhere"
    assert words.factors((1.2, 1.5, 1.0, 1.0, 1.0, 1.2)) == "0: 1.2, 1: 1.5, 2-4: 1, 5: 1.2"


def test_equal_scans_are_shown_once_and_damaged_ones_are_named(tmp_path: Path) -> None:
    scans = {"E5": scan(), "E5b": scan(), "Baseline": scan(layers="damaged")}
    report = declared(tmp_path, seeds=1, scans=scans)
    (found,) = report.scans
    assert found.used_by == ("E5", "E5b")
    assert any("scan.json is left out" in line for line in report.skipped)
    html = page(report)
    assert "Scan of E5, E5b (seed 0, 2,048 tokens)" in html and "gradient score *" in html
    assert "http://" not in html


@pytest.mark.parametrize(
    "hostile",
    [
        {"metrics": {"gradient": {**METRIC, "title": HOSTILE, "unit": HOSTILE, "meaning": HOSTILE}}},
        {"layers": [{"layer": HOSTILE, "gradient": 1.0}]},
        {"layers": [{"layer": 0, "gradient": HOSTILE}]},
        {"warnings": [HOSTILE]},
    ],
)
def test_text_in_a_scan_cannot_break_out_of_the_page(tmp_path: Path, hostile: dict[str, object]) -> None:
    html = page(declared(tmp_path, seeds=1, scans={"E5": scan(**hostile)}))
    assert "<script>alert" not in html


def test_experiments_that_were_not_run_take_one_line(tmp_path: Path) -> None:
    report = declared(tmp_path)
    html = page(report)
    assert html.count("Not run: E9b.") == 2
    output = io.StringIO()
    Console(width=80, file=output).print(terminal_table(report))
    text = output.getvalue()
    assert "not run: E9b" in text
    assert any(line.startswith("E5b  ") for line in text.splitlines()) and "E5b against E5" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_text_says_which_arm_is_best_or_that_none_is_or_nothing(tmp_path: Path) -> None:
    report = declared(tmp_path / "three")
    assert words.best_text(report.rows) == "no arm is shown to be the best on its hardware"
    assert words.best_text(declared(tmp_path / "one", seeds=1).rows) == ""
    first, *rest = report.rows
    assert words.best_text([replace(first, is_best=True), *rest]) == "best on its hardware: Baseline"


def test_single_peaks_do_not_flatten_a_diagnostic() -> None:
    steps, calm = tuple(range(20)), (1.0, 1.2) * 10
    peaked = (*calm[:10], 5000.0, *calm[11:])
    curve, other = (Curve(steps, values, values, values, 1) for values in (peaked, calm))
    title, cut = plots.without_peaks("Ratio", [plots.Named("a", curve, 0)])
    assert title == "Ratio (cut off: peaks to 5e+03)"
    assert max(cut[0].curve.mean) < 10
    assert plots.without_peaks("Ratio", [plots.Named("a", other, 0)]) == ("Ratio", [plots.Named("a", other, 0)])
