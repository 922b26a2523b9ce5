"""`roundoff compare`: what a name stands for, what the answer says, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from roundoff.cli import cli
from roundoff.config import ConfigError
from tests.simulated import experiment, profile, quickstart, write_run

HALF = (np.arange(200) < 100).astype(float)


def compared(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(cli, ["compare", *map(str, arguments)])


def refused(*arguments: object) -> str:
    error = compared(*arguments).exception
    assert isinstance(error, ConfigError)
    return str(error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    quickstart(root, problems=200, noise=-2.0)
    return root


def test_a_cost_is_stated_with_its_interval_and_p(runs: Path) -> None:
    said = compared("noise", "plain", "--runs", runs).output
    assert said.startswith("The hardware of A costs accuracy: it scores ")
    assert "points less than B with the hardware on (95 %: −" in said
    assert "Paired by seed and problem over the same 200 problems; B on plain arithmetic." in said
    assert "They differ in hardware.matmul_noise.relative_std." in said
    assert "McNemar" not in said


def test_an_effect_that_is_not_shown_is_stated_as_such_and_a_margin_is_tested(runs: Path) -> None:
    said = compared("mxfp4", "plain", "--runs", runs, "--margin", 20).output
    assert said.startswith("No cost is shown: ")
    assert "That A loses less than 20 points is shown (one-sided p " in said
    assert (
        "That A loses less than 0.1 points is not shown"
        in compared("noise", "plain", "--runs", runs, "--margin", 0.1).output
    )


def test_two_single_runs_are_paired_by_problem_and_not_called_a_test(runs: Path) -> None:
    one, two = sorted(runs.glob("noise/*/seed-*"))[:2]
    said = compared(one, two).output
    assert said.startswith("Not testable. One run each: ")
    assert "Paired by problem over" in said and "Their settings are equal." in said
    assert "Seed 0 of A and seed 1 of B: A alone solves " in said
    assert "exact McNemar test" in said and "This says nothing of other seeds." in said


def test_flips_are_counted_by_hand(tmp_path: Path) -> None:
    """A solves problems 0 to 119, B 0 to 99 and 150, so A alone solves 20 and B alone 1; p = 2 * (1 + 21) / 2^21."""
    better, worse = (np.arange(200) < 120).astype(float), HALF.copy()
    worse[150] = 1
    for name, solved in (("a", better), ("b", worse)):
        write_run(tmp_path, experiment(name, **({"lora": {}} if name == "a" else {})), 0, solved, solved)
    said = compared("a", "b", "--runs", tmp_path).output
    assert "Seed 0: A alone solves 20, B alone 1 of 200 problems (exact McNemar test, p < 0.001)" in said
    assert "these two runs differ by more than chance" in said


def test_an_experiment_with_two_settings_must_be_named_by_its_directory(tmp_path: Path) -> None:
    for size in (16, 32):
        write_run(tmp_path, experiment("a"), 0, HALF, HALF, scale=profile(prompts_per_step=size))
    message = refused("a", "a", "--runs", tmp_path)
    assert "a stands for 2 arms: name one of" in message
    one, two = message.splitlines()[1:]
    assert "They differ in profile.training.prompts_per_step." in compared(one.strip(), two.strip()).output


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("plain", "noise"), "the other way round it would be a cost"),
        (("noise", "mxfp4"), "deployed on different hardware"),
        (("nose", "plain"), "did you mean 'noise'?"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(runs: Path, names: tuple[str, str], reason: str) -> None:
    assert reason in refused(*names, "--runs", runs)


def test_other_problems_and_empty_directories_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, experiment("a"), 0, HALF, HALF)
    write_run(tmp_path, experiment("b", lora={}), 0, HALF[:150], HALF[:150])
    (tmp_path / "empty").mkdir()
    assert "scored on different problems (200 and 150" in refused("a", "b", "--runs", tmp_path)
    assert "there is no run in" in refused(tmp_path / "empty", "a", "--runs", tmp_path)


def test_runs_without_a_partner_are_counted(tmp_path: Path) -> None:
    for seed in range(4):
        write_run(tmp_path, experiment("a", lora={}), seed, HALF, HALF)
    for seed in (0, 1):
        write_run(tmp_path, experiment("b"), seed, HALF, HALF)
    said = compared("a", "b", "--runs", tmp_path).output
    assert said.startswith("Not testable. Two seeds in common: ")
    assert "Left out: 2 complete runs without a partner of the same seed." in said
