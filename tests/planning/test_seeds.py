"""`roundoff plan`: seeds and time from runs, costs of experiments, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from roundoff import stats
from roundoff.cli import cli
from roundoff.config import ConfigError
from roundoff.planning.seeds import ASSUMED, measured_time, measured_variance
from roundoff.runs.record import find_runs
from tests.simulated import experiment, quickstart, write_run


def planned(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["plan", *map(str, arguments)])


def lines(*arguments: object) -> list[str]:
    done = planned(*arguments)
    assert done.exception is None, done.output
    return done.output.splitlines()


def test_variance_is_the_mean_over_comparisons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shares = {"a": [0.6, 0.6, 0.6], "b": [0.4, 0.6, 0.8], "c": [0.3, 0.6, 0.9]}  # solved, by seed
    outcomes = {name: (rng.random((3, 80)) < np.array(each)[:, None]).astype(float) for name, each in shares.items()}
    for name, solved in outcomes.items():
        for seed in range(3):
            settings = {} if name == "a" else {"baseline": "a", "lora": {"rank": 4 if name == "b" else 8}}
            write_run(tmp_path, experiment(name, **settings), seed, solved[seed], solved[seed])
    found = measured_variance(find_runs([tmp_path])[0])
    each = [stats.difference_variance(outcomes[name], outcomes["a"]) for name in ("b", "c")]
    assert found.variance.seed == pytest.approx((each[0].seed + each[1].seed) / 2)
    assert found.variance.residual == pytest.approx((each[0].residual + each[1].residual) / 2)
    assert "measured in 2 comparisons" in found.source and "4 degrees of freedom, which is rough" in found.source


def test_no_variance_between_few_seeds_is_unknown_and_not_zero(tmp_path: Path) -> None:
    solved = np.arange(80) % 2
    for seed in range(3):
        write_run(tmp_path, experiment("a"), seed, solved, solved)
        write_run(tmp_path, experiment("b", baseline="a", lora={"rank": 4}), seed, 1 - solved, solved)
    arms = [np.tile(outcomes, (3, 1)) for outcomes in (1 - solved, solved)]
    assert stats.difference_variance(*arms).seed == 0
    found = measured_variance(find_runs([tmp_path])[0])
    assert found.variance.seed == ASSUMED.seed
    said = lines("--effect", 3, "--runs", tmp_path)
    assert (
        "Variance: measured in 1 comparison: too few seeds to tell how much their differences vary (2 degrees of "
        "freedom), so that this is unknown and 1 point is assumed."
    ) in said


def test_no_variance_between_many_seeds_is_taken_as_measured(tmp_path: Path) -> None:
    solved = np.arange(80) % 2
    for seed in range(11):
        write_run(tmp_path, experiment("a"), seed, solved, solved)
        write_run(tmp_path, experiment("b", baseline="a", lora={"rank": 4}), seed, 1 - solved, solved)
    found = measured_variance(find_runs([tmp_path])[0])
    assert found.variance.seed == 0
    assert "vary by 0.00 points (standard deviation, 10 degrees of freedom)" in found.source


def test_without_runs_the_variance_is_assumed_and_says_so(tmp_path: Path) -> None:
    assert measured_variance([]).variance == ASSUMED
    said = lines("--effect", 3, "--runs", tmp_path)
    assert "Variance: assumed, because no comparison of two seeds or more was found: seeds 1 point apart." in said
    row = next(line.split() for line in said if line.startswith("   1,319"))
    seeds = stats.plan(0.03, ASSUMED, problems=[1319])[0].seeds
    assert row[:3] == ["1,319", str(seeds), str(2 * (seeds or 0))]


def test_time_comes_from_measured_steps(tmp_path: Path) -> None:
    """With 50 steps of 2 s and two evaluations of 3 s over 100 problems, a run over 400 problems takes 100 + 24 s."""
    path = write_run(tmp_path, experiment("a"), 0, np.ones(100), np.ones(100))
    rows = [{"step": s, "seconds": 2.0} for s in range(1, 51)]
    rows[9] |= {"seconds": 5.0, "seconds_evaluate": 3.0}
    rows[19] |= {"seconds": 5.0, "seconds_evaluate": 3.0}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured_time(find_runs([tmp_path])[0])
    assert found is not None
    assert (found.training, found.problem) == (pytest.approx(100.0), pytest.approx(0.06))
    assert found.seconds(400) == pytest.approx(124.0)
    said = lines("--effect", 5, "--runs", tmp_path, "--problems", "100,400", "--gpus", 2)
    assert "Time: measured in 1 run of profile tiny; 2 runs at a time." in said


def test_experiments_named_are_those_whose_variance_counts(tmp_path: Path) -> None:
    quickstart(tmp_path, problems=100)
    assert any("measured in 3 comparisons" in line for line in lines("--effect", 4, "--runs", tmp_path))
    assert any("measured in 1 comparison:" in line for line in lines("noise-aqn", "--effect", 4, "--runs", tmp_path))
    error = planned("absent", "--effect", 4, "--runs", tmp_path).exception
    assert isinstance(error, ConfigError) and "there is no run of absent" in str(error)


def test_a_smaller_effect_needs_more_seeds(tmp_path: Path) -> None:
    quickstart(tmp_path, problems=100)

    def seeds(*options: object) -> int:
        (row,) = (s for s in lines("--runs", tmp_path, "--problems", 5000, *options) if s.startswith("   5,000"))
        return int(row.split()[1])

    assert seeds("--effect", 20) == 3
    assert seeds("--effect", 4) < seeds("--effect", 2)
    assert seeds("--effect", 4) < seeds("--effect", 4, "--comparisons", 30)


def test_costs_of_the_declared_table_are_printed_with_what_they_rest_on() -> None:
    said = "\n".join(lines("--profile", "gsm8k-1.5b", "--gpus", 8, "E3a", "E13h", "--seeds", "0-4"))
    assert "gsm8k-1.5b: Qwen/Qwen2.5-1.5B-Instruct, 1.54 billion parameters in bfloat16, on 8 x a100-80gb" in said
    assert "10 runs (2 experiments, 5 seeds), a device each" in said and "with 8 at a time" in said
    for assumption in ("data sheet", "plain torch path", "7,473 training", "ln n", "left out", "equal rewards"):
        assert assumption in said
    small = "\n".join(lines("--profile", "gsm8k-1.5b", "--gpus", 8, "E3a", "--memory", 30))
    assert "too much" in small and "too much" not in said


def test_arithmetic_that_has_no_price_is_said_to_be_left_out(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('extends = ["E3a"]\n[hardware.accumulator]\nbits = 13\n')
    said = "\n".join(lines("--profile", "gsm8k-1.5b", "--gpus", 8, "E3a", own))
    assert "left out, too, in own: what hardware.accumulator" in said


def test_lengths_may_be_given() -> None:
    said = lines("--profile", "gsm8k-1.5b", "--gpus", 8, "E3a", "--prompt-tokens", 100, "--response-tokens", 200)
    assert "- a prompt has 100 and a response 200 tokens on average (as given)" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give --effect POINTS"),
        (("--profile", "gsm8k-1.5b", "--gpus", 8, "--ranks", 3), "must be a multiple of --ranks 3"),
        (("--profile", "gsm8k-1.5b", "--machine", "tpu"), "--machine must be one of here, a100-80gb"),
        (("--effect", 1, "--problems", "many"), "--problems must read 256 or 256,1024"),
        (("--profile", "gsm8k-1.5", "E3a"), "did you mean 'gsm8k-1.5b'?"),
    ],
)
def test_impossible_requests_are_refused(arguments: tuple[object, ...], reason: str) -> None:
    error = planned(*arguments).exception
    assert isinstance(error, ConfigError)
    assert reason in str(error)


def test_a_name_without_runs_is_refused_though_another_has_some(tmp_path: Path) -> None:
    quickstart(tmp_path, problems=20)
    error = planned("--effect", 2, "noise-aqn", "nose", "--runs", tmp_path).exception
    assert isinstance(error, ConfigError)
    assert "there is no run of nose in" in str(error) and "did you mean 'noise'?" in str(error)
