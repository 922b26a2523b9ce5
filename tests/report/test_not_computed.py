"""A failure is never a result: runs that trained nothing, and scores that were only partly computed."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from roundoff.config import ConfigError
from roundoff.report.assemble import build_report
from roundoff.report.pair import find_arm, make_pair, pair_text
from roundoff.report.render import markdown, page, table_csv, terminal_table, write_report
from roundoff.runs.outcomes import evaluation_lines, read_evaluation
from roundoff.runs.record import find_runs
from roundoff.runs.strict_json import dumps
from tests.simulated import experiment, write_run

NOISY = {"hardware": {"matmul_noise": {"relative_std": 0.1}}, "baseline": "plain"}
EQUAL = "nothing was trained in 40 steps: the rewards within each group were equal"
RNG = np.random.default_rng(0)
PLAIN, WORSE = (RNG.random(100) < 0.6).astype(float), (RNG.random(100) < 0.5).astype(float)


def counts(path: Path, **values) -> None:
    """Give every step of a run the counts that the training loop writes."""
    file = path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ordinary = {"prompts": 4, "trained": True, "nonfinite": 0, "reward_errors": 0, "truncated": 0.0, "empty": 0.0}
    rows = [row if row["step"] == 0 else row | ordinary | values for row in rows]
    file.write_text("".join(dumps(row) + "\n" for row in rows))


def arms(root: Path, *, untrained: tuple[int, ...] = (), **values) -> None:
    """A noisy arm against a plain one, three seeds each."""
    for seed in range(3):
        counts(write_run(root, experiment("plain"), seed, PLAIN, PLAIN))
        path = write_run(root, experiment("noisy", **NOISY), seed, WORSE, PLAIN)
        counts(path, **(values or {"trained": False}) if seed in untrained else {})


def spoil(root: Path, bad: int) -> None:
    """The first `bad` deployed responses of the noisy arm's last evaluation were not computed."""
    for file in root.glob("noisy/**/step-000040.jsonl"):
        found = read_evaluation(file.parents[1], 40)
        outcomes = [replace(o, flaws=("nonfinite" if i < bad else "",)) for i, o in enumerate(found.outcomes)]
        file.write_text(evaluation_lines(replace(found, outcomes=tuple(outcomes))))


def report_on(root: Path):
    return build_report(*find_runs([root]))


def texts(root: Path) -> dict[str, str]:
    """Every form of the report on the runs below `root`."""
    report = report_on(root)
    written = {path.name: path.read_text() for path in write_report(report, root / "report")}
    return {**written, "terminal": terminal(report)}


def terminal(report) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(terminal_table(report))
    return captured.get()


@pytest.mark.parametrize("untrained", [(1,), (0, 1, 2)])
def test_no_verdict_on_runs_that_trained_nothing(tmp_path, untrained):
    arms(tmp_path, untrained=untrained)
    row = next(row for row in report_on(tmp_path).rows if row.id == "noisy")
    assert row.comparison is None
    assert f"noisy seed {untrained[0]} is complete, but {EQUAL}" in row.no_comparison
    assert not row.is_whole
    assert f"seed {untrained[0]} complete, but {EQUAL}" in row.status
    for name, text in texts(tmp_path).items():
        assert "nothing was trained" in text, name
        assert "no cost shown" not in text and "costs accuracy" not in text, name


def test_an_untrained_baseline_is_not_compared_with(tmp_path):
    for seed in range(3):
        counts(write_run(tmp_path, experiment("plain"), seed, PLAIN, PLAIN), trained=False)
        counts(write_run(tmp_path, experiment("noisy", **NOISY), seed, WORSE, PLAIN))
    row = next(row for row in report_on(tmp_path).rows if row.id == "noisy")
    assert row.comparison is None and "plain seed 0 is complete, but nothing was trained" in row.no_comparison
    with pytest.raises(ConfigError, match="plain seed 0 is complete, but nothing was trained"):
        make_pair(find_arm("noisy", tmp_path), find_arm("plain", tmp_path), margin=None)


def test_csv_and_json_hold_what_was_not_computed(tmp_path):
    arms(tmp_path, untrained=(1,), trained=False, nonfinite=2)
    report = report_on(tmp_path)
    noisy = next(row for row in csv.DictReader(table_csv(report).splitlines()) if row["id"] == "noisy")
    assert (noisy["untrained_runs"], noisy["verdict"].count("nothing was trained")) == ("1", 1)
    write_report(report, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    seeds = next(row for row in rows if row["id"] == "noisy")["seeds"]
    assert [seed["trained_steps"] for seed in seeds] == [40, 0, 40]
    assert "80 of 800 rollouts were not computed" in seeds[1]["untrained"]


def test_a_share_that_was_not_computed_stands_beside_the_score(tmp_path):
    arms(tmp_path)
    ordinary = report_on(tmp_path)
    spoil(tmp_path, bad=13)
    report = report_on(tmp_path)
    row = next(row for row in report.rows if row.id == "noisy")
    assert row.deployed == next(other for other in ordinary.rows if other.id == "noisy").deployed  # solved over all
    said = "39 of 300 responses were not computed: the logits were not finite"
    assert row.notes == (f"deployed, last evaluation: {said}",)
    for name, text in texts(tmp_path).items():
        assert said in text, name
    noisy = next(row for row in csv.DictReader(table_csv(report).splitlines()) if row["id"] == "noisy")
    assert float(noisy["nonfinite"]) == 0.13
    pair = make_pair(find_arm("noisy", tmp_path), find_arm("plain", tmp_path), margin=None)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(pair_text(pair))
    assert f"A, deployed, last evaluation: {said}" in captured.get()


def test_rollouts_that_were_not_computed_are_noted(tmp_path):
    arms(tmp_path, untrained=(1,), nonfinite=2)
    row = next(row for row in report_on(tmp_path).rows if row.id == "noisy")
    assert row.comparison is not None and row.is_whole  # it did train
    assert row.notes[0].startswith("seed 1: 80 of 800 rollouts were not computed")


def test_an_ordinary_report_does_not_mention_failures(tmp_path):
    arms(tmp_path)
    report = report_on(tmp_path)
    assert all(row.notes == () and row.is_whole for row in report.rows)
    for text in (page(report), markdown(report), terminal(report)):
        assert "not computed" not in text.lower()


def test_a_flip_says_why_there_is_no_response(tmp_path):
    arms(tmp_path)
    spoil(tmp_path, bad=100)
    row = next(row for row in report_on(tmp_path).rows if row.id == "noisy")
    assert row.flips is not None
    assert all("[not computed any further: the logits" in flip.treatment_response for flip in row.flips.shown)


@pytest.mark.parametrize("damage", ["half", "others"])
def test_a_last_evaluation_that_is_not_whole_is_left_out_with_the_reason(tmp_path, damage):
    arms(tmp_path)
    (path,) = tmp_path.glob("noisy/*/seed-1")
    counts(path, problems=100)
    file = path / "evaluations" / "step-000040.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if damage == "half":
        file.write_text("".join(lines[:50]))
    else:
        file.write_text("".join(line.replace("sum/", "other/") for line in lines))
    report = report_on(tmp_path)
    said = {"half": "holds 50 outcomes, but 100 problems", "others": "holds other problems than that of step 0"}
    assert said[damage] in report.skipped[0]
    assert next(row for row in report.rows if row.id == "noisy").deployed.seeds == 2
