"""Axes have round numbers, and the geometry stays inside its box."""

from dataclasses import replace

import numpy as np
import pytest

from roundoff.report import plots
from roundoff.report.assemble import build_report
from roundoff.report.curves import MOST_POINTS, Curve
from roundoff.report.render import page
from roundoff.runs.record import find_runs
from tests.simulated import experiment, quickstart, write_run


@pytest.mark.parametrize(
    ("low", "high", "scale", "labels"),
    [
        (0.212, 0.638, 100, ["20", "30", "40", "50", "60", "70"]),
        (0.0, 0.05, 1, ["0.00", "0.01", "0.02", "0.03", "0.04", "0.05"]),
        (0.0, 40.0, 1, ["0", "10", "20", "30", "40"]),
        (0.5, 0.5, 100, ["49.4", "49.6", "49.8", "50.0", "50.2", "50.4", "50.6"]),
        (0.0, 0.012, 1, ["0.0000", "0.0025", "0.0050", "0.0075", "0.0100", "0.0125"]),
        (0.0, 1e-6, 1, ["0.0000000", "0.0000002", "0.0000004", "0.0000006", "0.0000008", "0.0000010"]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, scale: float, labels: list[str]) -> None:
    found = plots.axis(low, high, scale=scale)
    assert [tick.label for tick in found.ticks] == labels
    assert found.low <= low and found.high >= high
    assert (found.ticks[0].at, found.ticks[-1].at) == (0, 100)


def test_signed_ticks_use_a_true_minus_and_zero_has_no_sign() -> None:
    assert [tick.label for tick in plots.axis(-0.11, 0.09, scale=100, signed=True).ticks] == [
        "−15", "−10", "−5", "0", "+5", "+10"
    ]  # fmt: skip


def test_every_mark_lies_on_the_axis_and_its_interval_around_it(tmp_path) -> None:
    quickstart(tmp_path)
    rows = build_report(*find_runs([tmp_path])).rows
    scores, effects = plots.score_forest(rows), plots.effect_forest(rows)
    assert scores and effects and effects.reference is not None
    for mark in [m for forest in (scores, effects) for found in forest.marks.values() for m in found]:
        assert 0 <= mark.low <= mark.mid <= mark.high <= 100
    (chart,) = plots.learning_charts(rows)
    assert [line.colour for line in chart.lines] == [0, 1, 2, 3]
    assert all(0 <= x <= 100 and 0 <= y <= 100 for line in chart.lines for x, y, _ in line.points)
    sigma = plots.sigma_chart(rows)
    assert sigma is not None and [line.colour for line in sigma.lines] == [3]
    shown = effects.marks[rows[2].key][0]
    assert rows[2].comparison is not None
    at = effects.axis.low + shown.mid / 100 * (effects.axis.high - effects.axis.low)
    assert at == pytest.approx(rows[2].comparison.deployed.estimate, abs=1e-4)


def test_sigma_is_a_staircase(tmp_path) -> None:
    quickstart(tmp_path, seeds=1, problems=20)
    curve = next(row.sigma for row in build_report(*find_runs([tmp_path])).rows if row.sigma)
    assert curve.mean[0] == 0.0
    for i in range(1, len(curve.steps)):
        assert curve.steps[i] == curve.steps[i - 1] or curve.mean[i] == curve.mean[i - 1]


def test_long_curves_are_averaged_in_bins(tmp_path) -> None:
    """999 steps become 111 points, each the mean of nine: steps 1 to 9 are drawn at step 5."""
    solved = np.ones(20)
    write_run(tmp_path, experiment("a"), 0, solved, solved, steps=999)
    (row,) = build_report(*find_runs([tmp_path])).rows
    curve = row.diagnostics["reward"]
    assert len(curve.steps) == len(curve.mean) == 111 <= MOST_POINTS
    assert curve.steps[:2] == (5.0, 14.0)
    rewards = [line["reward"] for line in find_runs([tmp_path])[0][0].metrics[1:10]]
    assert curve.mean[0] == pytest.approx(sum(rewards) / 9)


def curve_of(*values: float) -> Curve:
    return Curve(tuple(map(float, range(1, 1 + len(values)))), values, values, values, 1)


def test_corrections_are_drawn_of_the_runs_that_have_one(tmp_path) -> None:
    quickstart(tmp_path, seeds=1, problems=20)
    report = build_report(*find_runs([tmp_path]))
    assert plots.correction_charts(report.rows) == [] and "Corrections of rollouts" not in page(report)
    cut = {"rollout_is_mean": curve_of(0.9, 0.95), "rollout_rs_masked_fraction": curve_of(0.1, 0.2)}
    rows = [
        replace(row, diagnostics=row.diagnostics | cut) if i in (1, 3) else row for i, row in enumerate(report.rows)
    ]
    charts = plots.correction_charts(rows)
    assert [chart.title for chart in charts] == ["Weights of the correction: mean", "Tokens rejected (share)"]
    assert [[line.colour for line in chart.lines] for chart in charts] == [[1, 3]] * 2
    assert not {chart.title for chart in plots.diagnostic_charts(rows)} & {chart.title for chart in charts}
    html = page(replace(report, rows=tuple(rows)))
    assert (
        html.count("<summary>Corrections of rollouts") == 1 and html.count("Tokens rejected (share)</figcaption>") == 1
    )
    many = [*[report.rows[0]] * 9, *[rows[1]] * 9]  # of many arms, the first that are corrected
    assert [line.colour for line in plots.correction_charts(many)[0].lines] == list(range(plots.COLOURS))


def test_the_legend_of_charts_names_each_arm_that_any_of_them_has(tmp_path) -> None:
    quickstart(tmp_path, seeds=1, problems=20)
    first, second, *_ = build_report(*find_runs([tmp_path])).rows
    one, both = (
        curve_of(0.1, 0.2),
        {"rollout_is_mean": curve_of(0.9, 0.95), "rollout_rs_masked_fraction": curve_of(0, 1)},
    )
    rows = [replace(first, diagnostics=both), replace(second, diagnostics={"rollout_rs_masked_fraction": one})]
    assert [line.label for line in plots.legend(plots.correction_charts(rows))] == [first.name, second.name]
