"""The report as data: what is scored, what is not, and how each is reported."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from roundoff.report import words
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.report.render import page, table_csv, terminal_table, write_report
from roundoff.runs.record import find_runs
from tests.simulated import experiment, profile, quickstart, write_run

FIRST_HALF = (np.arange(100) < 50).astype(float)


def report_on(root: Path, **more) -> Report:
    return build_report(*find_runs([root]), **more)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("runs")
    quickstart(root)
    return report_on(root)


def test_rows_stand_baseline_first(simulated: Report) -> None:
    assert [row.id for row in simulated.rows] == ["plain", "mxfp4", "noise", "noise-aqn"]
    assert all(row.is_whole and row.status == "3 complete" for row in simulated.rows)


def test_the_simulated_cost_is_found_and_corrected_over_the_table(simulated: Report) -> None:
    noise = simulated.rows[2].comparison
    assert noise is not None and noise.deployed.p is not None and noise.p_holm is not None
    assert (noise.kind, noise.verdict, noise.tests, simulated.tests) == ("cost", "costs accuracy", 3, 3)
    assert noise.p_holm == pytest.approx(3 * noise.deployed.p)


def test_scores_are_means_of_the_last_evaluation(tmp_path: Path) -> None:
    for seed, rate in enumerate((0.2, 0.4, 0.6)):
        solved = (np.arange(100) < 100 * rate).astype(float)
        write_run(tmp_path, experiment("a"), seed, solved, np.ones(100))
    (row,) = report_on(tmp_path).rows
    assert row.deployed and row.clean
    assert (row.deployed.estimate, row.clean.estimate) == (pytest.approx(0.4), 1.0)
    assert row.learning is not None and row.learning.steps == (0, 10, 20, 30, 40)
    assert (row.learning.low[-1], row.learning.high[-1]) == (0.2, 0.6)


def test_a_run_that_ended_early_is_listed_and_not_scored(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, experiment("a"), seed, FIRST_HALF, FIRST_HALF)
    write_run(tmp_path, experiment("a"), 2, np.ones(100), np.ones(100), reached=20, state="interrupted")
    (row,) = report_on(tmp_path).rows
    assert row.deployed and (row.deployed.estimate, row.deployed.seeds) == (0.5, 2)
    assert row.status == "2 complete; seed 2 ended early at step 20 of 40: killed"
    assert not row.is_whole
    assert row.deployed.covers == "problems only"


def test_a_complete_run_without_its_last_evaluation_is_not_scored(tmp_path: Path) -> None:
    path = write_run(tmp_path, experiment("a"), 0, FIRST_HALF, FIRST_HALF)
    (path / "evaluations" / "step-000040.jsonl").unlink()
    (row,) = report_on(tmp_path).rows
    assert row.deployed is None
    assert "not evaluated at its last step" in row.status


def test_a_seed_that_the_family_has_and_an_arm_lacks_is_missing(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, experiment("a"), seed, FIRST_HALF, FIRST_HALF)
    write_run(tmp_path, experiment("b"), 1, FIRST_HALF, FIRST_HALF)
    assert report_on(tmp_path).rows[1].status == "1 complete; seeds 0, 2 missing"


def test_declared_experiments_without_runs_are_missing(tmp_path: Path) -> None:
    write_run(tmp_path, experiment("a"), 0, FIRST_HALF, FIRST_HALF)
    report = report_on(tmp_path, experiments=[experiment("z", baseline="a"), experiment("a")])
    assert [(row.id, row.status[:7]) for row in report.rows] == [("a", "1 compl"), ("z", "missing")]
    assert "1 declared experiment not run" in words.overview(report)


@pytest.mark.parametrize(
    ("settings", "scale", "reason"),
    [
        ({"baseline": "absent"}, None, "is not among these runs"),
        ({"baseline": "a"}, profile(prompts_per_step=16), "other profile settings"),
        ({"baseline": "chip", "hardware": {"precision": {"weight": "nvfp4"}}}, None, "different hardware"),
    ],
)
def test_the_reason_is_given_where_nothing_was_compared(tmp_path: Path, settings: dict, scale, reason: str) -> None:
    write_run(tmp_path, experiment("a"), 0, FIRST_HALF, FIRST_HALF)
    chip = experiment("chip", hardware={"precision": {"weight": "mxfp4"}})
    write_run(tmp_path, chip, 0, FIRST_HALF, FIRST_HALF)
    write_run(tmp_path, experiment("b", **settings), 0, FIRST_HALF, FIRST_HALF, scale=scale)
    row = next(row for row in report_on(tmp_path).rows if row.id == "b")
    assert row.comparison is None
    assert reason in row.no_comparison


def test_damaged_foreign_and_duplicate_runs_are_skipped_with_the_reason(tmp_path: Path) -> None:
    for root in ("one", "two"):
        write_run(tmp_path / root, experiment("a"), 0, FIRST_HALF, FIRST_HALF)
    half = write_run(tmp_path / "one", experiment("a"), 1, FIRST_HALF, FIRST_HALF)
    file = half / "evaluations" / "step-000040.jsonl"
    file.write_text(file.read_text("utf-8")[:1010], "utf-8")
    other = write_run(tmp_path / "one", experiment("a"), 2, np.ones(70), np.ones(70))
    (tmp_path / "one" / "foreign" / "seed-9").mkdir(parents=True)
    (tmp_path / "one" / "foreign" / "seed-9" / "notes.txt").write_text("none of ours")
    report = report_on(tmp_path)
    (row,) = report.rows
    assert [seed.seed for seed in row.seeds] == [0]
    reasons = "\n".join(report.skipped)
    for text in ("second copy", str(file), f"{other}: was scored on other problems", "foreign/seed-9"):
        assert text in reasons
    assert len(report.skipped) == 4


def test_an_arm_is_best_only_beyond_its_error(tmp_path: Path) -> None:
    quickstart(tmp_path / "far", aqn=1.5)
    quickstart(tmp_path / "near", aqn=0.05)
    assert [row.id for row in report_on(tmp_path / "far").rows if row.is_best] == ["noise-aqn"]
    assert not any(row.is_best for row in report_on(tmp_path / "near").rows)


def test_flips_show_the_responses_that_made_them(simulated: Report) -> None:
    flips = simulated.rows[2].flips
    assert flips is not None and [flip.gained for flip in flips.shown] == [True] * 3 + [False] * 3
    for flip in flips.shown:
        solver, other = flip.treatment_response, flip.baseline_response
        if not flip.gained:
            solver, other = other, solver
        assert solver.endswith(f">{flip.answer}") and not other.endswith(f">{flip.answer}")
    comparison = simulated.rows[2].comparison
    assert comparison is not None
    assert flips.gained == pytest.approx(sum(f.gained for f in comparison.flips) / 3)


def test_an_arm_that_loses_nothing_shows_no_losses(tmp_path: Path) -> None:
    more = (np.arange(100) < 52).astype(float)
    for seed in range(3):
        write_run(tmp_path, experiment("a"), seed, FIRST_HALF, FIRST_HALF)
        write_run(tmp_path, experiment("b", baseline="a", lora={}), seed, more, more)
    flips = report_on(tmp_path).rows[1].flips
    assert flips is not None and (flips.gained, flips.lost) == (2.0, 0.0)
    assert [(flip.problem, flip.gained) for flip in flips.shown] == [("sum/0050", True), ("sum/0051", True)]


def test_answers_state_the_effects(simulated: Report) -> None:
    (answer,) = words.answers(simulated)
    assert "3 seeds, 300 problems" in answer.asked
    assert "10 % matmul noise: costs " in answer.answer
    assert "MXFP4 weights and activations: no cost shown" in answer.answer


def test_many_comparisons_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = (rng.random((3, 400)) < 0.8).astype(float)
    for seed in range(3):
        write_run(tmp_path, experiment("plain", family="f"), seed, plain[seed], plain[seed])
        for i, loss in enumerate((0.0, 0.5, 0.3, 0.4)):
            what = experiment(
                f"n{i}", family="f", baseline="plain", hardware={"matmul_noise": {"relative_std": 0.1 + i / 100}}
            )
            worse = plain[seed] * (rng.random(400) >= loss)
            write_run(tmp_path, what, seed, worse, plain[seed])
    (answer,) = words.answers(report_on(tmp_path))
    assert answer.answer.startswith("of 4 hardware settings tested, 3 cost accuracy, most of all n1 (")
    assert answer.answer.endswith("1 show no effect beyond their error.")


def test_four_files_are_written_and_agree(simulated: Report, tmp_path: Path) -> None:
    paths = write_report(simulated, tmp_path / "out")
    assert [path.name for path in paths] == ["summary.md", "results.csv", "results.json", "report.html"]
    data = json.loads(paths[2].read_text("utf-8"))
    row = simulated.rows[3]
    assert row.deployed and row.comparison
    assert data["rows"][3]["deployed"]["estimate"] == row.deployed.estimate
    line = paths[1].read_text("utf-8").splitlines()[4]
    assert f",{round(row.deployed.estimate, 6)}," in line and row.comparison.verdict in line
    for path in (paths[0], paths[3]):
        text = path.read_text("utf-8")
        assert words.percent(row.deployed.estimate) in text and words.points(row.comparison.deployed.estimate) in text


def test_the_report_is_deterministic(simulated: Report, tmp_path: Path) -> None:
    first, second = (write_report(simulated, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_csv_has_one_line_a_row_and_every_column(simulated: Report) -> None:
    lines = table_csv(simulated).splitlines()
    assert len(lines) == 5
    assert lines[1].count(",") == lines[0].count(",")


def test_the_terminal_table_fits_80_columns(simulated: Report) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(terminal_table(simulated))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "costs accuracy" in text and "58.9 % [" in text


def test_two_single_runs_of_different_seeds_are_reported_as_such(tmp_path: Path) -> None:
    """Seed 1 of the baseline solves problems 0 to 49, seed 0 of the treatment 0 to 59: ten gained."""
    write_run(tmp_path, experiment("a"), 1, FIRST_HALF, FIRST_HALF)
    more = (np.arange(100) < 60).astype(float)
    write_run(tmp_path, experiment("b", baseline="a", lora={}), 0, more, more)
    report = report_on(tmp_path)
    flips, comparison = report.rows[1].flips, report.rows[1].comparison
    assert flips and comparison
    assert (flips.seed, flips.baseline_seed, flips.gained, flips.lost) == (0, 1, 10.0, 0.0)
    assert comparison.verdict == "one run: not testable"
    assert words.paired_text(comparison) == "seed 0 with seed 1, by problem alone"
    assert "seed 0 with seed 1, by problem alone" in page(report)
    assert "and, of the baseline, of seed 1" in page(report)


def test_a_difference_over_fewer_seeds_than_the_scores_says_so(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, experiment("b", baseline="a", lora={}), seed, FIRST_HALF, FIRST_HALF)
    for seed in range(3):
        write_run(tmp_path, experiment("a"), seed, FIRST_HALF, FIRST_HALF)
    (comparison,) = (row.comparison for row in report_on(tmp_path).rows if row.comparison)
    assert words.paired_text(comparison) == "over seeds 0, 1, 2: 2 runs without a partner"


def test_a_single_problem_is_left_out_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path, experiment("a"), 0, np.ones(1), np.ones(1))
    report = report_on(tmp_path)
    assert report.rows == ()
    assert "scored on a single problem" in report.skipped[0]


def test_numbers_that_are_not_finite_leave_the_report_whole(tmp_path: Path) -> None:
    """If a ratio overflows in one step, the curve skips it and results.json stays valid JSON."""
    what = experiment("a", aqn={"sigma_start": 0.05, "sigma_end": 0.01})
    path = write_run(tmp_path / "runs", what, 0, FIRST_HALF, FIRST_HALF)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[5] |= {"ratio_std": float("nan"), "kl": float("inf")}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "preflight.json").write_text('{"kl": Infinity}')
    report = report_on(tmp_path / "runs")
    written = write_report(report, tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(written[2].read_text("utf-8"), parse_constant=refuse)
    assert data["rows"][0]["aqn"]["kl"] is None
    curve = report.rows[0].diagnostics["ratio_std"]
    assert 5 not in curve.steps and 6 in curve.steps


def test_an_arm_that_was_not_compared_with_a_better_one_is_not_best(tmp_path: Path) -> None:
    """c has the highest score, but under seeds that no other arm has, so nothing shows that b is the best."""
    for name, solved, first, lora in (("a", 100, 0, None), ("b", 200, 0, {}), ("c", 290, 5, {"rank": 4})):
        for seed in range(3):
            outcomes = (np.arange(300) < solved + seed).astype(float)
            write_run(tmp_path, experiment(name, family="f", lora=lora), first + seed, outcomes, outcomes)
    assert not any(row.is_best for row in report_on(tmp_path).rows)


def test_a_baseline_with_runs_of_two_settings_is_not_chosen_by_chance(tmp_path: Path) -> None:
    old, new = {"name": "GRPO"}, {"name": "GRPO", "group_size": 6}
    for seed in range(3):
        for algorithm in (old, new):
            write_run(tmp_path, experiment("base", algorithm=algorithm), seed, FIRST_HALF, FIRST_HALF)
        write_run(tmp_path, experiment("t", baseline="base", lora={}, algorithm=new), seed, FIRST_HALF, FIRST_HALF)
    (row,) = (row for row in report_on(tmp_path).rows if row.id == "t")
    assert row.comparison is None and row.flips is None
    assert "its baseline base has runs of 2 settings" in row.no_comparison


def test_the_baseline_on_the_same_hardware_is_chosen(tmp_path: Path) -> None:
    for std in (0.1, 0.2):
        chip = {"matmul_noise": {"relative_std": std}}
        for seed in range(3):
            write_run(tmp_path, experiment("base", hardware=chip), seed, FIRST_HALF, FIRST_HALF)
            write_run(tmp_path, experiment("t", baseline="base", lora={}, hardware=chip), seed, FIRST_HALF, FIRST_HALF)
    found = [row.comparison for row in report_on(tmp_path).rows if row.id == "t"]
    assert [c.kind if c else None for c in found] == ["benefit", "benefit"]


def test_no_cell_of_the_csv_is_a_formula_and_no_p_is_zero(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, experiment("a", title='=HYPERLINK("x","y")'), seed, np.zeros(100), np.zeros(100))
        write_run(tmp_path, experiment("b", baseline="a", lora={}), seed, np.ones(100), np.ones(100))
    first, second = csv.DictReader(table_csv(report_on(tmp_path)).splitlines())
    assert first["title"] == '\'=HYPERLINK("x","y")'
    assert 0 < float(second["p"]) < 1e-6
