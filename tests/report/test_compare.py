"""Which arms can be compared, which are refused, and with what conclusion."""

from pathlib import Path

import numpy as np
import pytest

from roundoff.config import ConfigError
from roundoff.report.compare import compare
from roundoff.runs.record import Run, find_runs
from tests.simulated import experiment, profile, write_run

NOISE = {"matmul_noise": {"relative_std": 0.1}}
MXFP4 = {"precision": {"weight": "mxfp4"}}
AQN = {"sigma_start": 0.05, "sigma_end": 0.0005}


def arm(
    root: Path, name: str, rate: float, *, seeds: int = 4, problems: int = 200, scale=None, **settings
) -> list[Run]:
    """Runs that solve the first `rate` of the problems, but for one problem that differs by seed."""
    for seed in range(seeds):
        solved = (np.arange(problems) < rate * problems).astype(float)
        solved[-1 - seed] = 1 - solved[-1 - seed]
        what = experiment(name, **settings)
        write_run(root / name, what, seed, solved, solved, steps=10, scale=scale or profile())
    return find_runs([root / name])[0]


def test_a_remedy_on_the_same_hardware_is_a_benefit(tmp_path: Path) -> None:
    new = arm(tmp_path, "aqn", 0.7, hardware=NOISE, aqn=AQN)
    old = arm(tmp_path, "noise", 0.5, hardware=NOISE)
    result = compare(new, old)
    assert (result.kind, result.seeds, result.problems) == ("benefit", (0, 1, 2, 3), 200)
    assert result.deployed.estimate == pytest.approx(0.2)
    assert result.verdict == "helps"
    assert result.differs == ("aqn",)
    assert [(f.gained, f.lost) for f in result.flips] == [(40, 0)] * 4
    assert compare(old, new).verdict == "hurts"


def test_hardware_against_plain_arithmetic_is_a_cost(tmp_path: Path) -> None:
    result = compare(arm(tmp_path, "noise", 0.5, hardware=NOISE), arm(tmp_path, "plain", 0.7))
    assert (result.kind, result.verdict) == ("cost", "costs accuracy")
    assert result.differs == ("hardware.matmul_noise.relative_std",)


def test_layers_kept_in_high_precision_are_a_remedy_and_not_another_chip(tmp_path: Path) -> None:
    kept = {"precision": {"weight": "mxfp4", "keep": [0, 1]}}
    result = compare(arm(tmp_path, "keep", 0.7, hardware=kept), arm(tmp_path, "all", 0.5, hardware=MXFP4))
    assert (result.kind, result.verdict) == ("benefit", "helps")


@pytest.mark.parametrize(
    ("remedy", "chip"),
    [
        ({"weight": "nvfp4:2d"}, {"weight": "nvfp4"}),
        ({"weight": "e2m1/32x32/e8m0"}, {"weight": "mxfp4"}),
        ({"weight": "nvfp4:46", "activation": "nvfp4:te"}, {"weight": "nvfp4", "activation": "nvfp4"}),
        ({"weight": "mxfp4:rceil"}, {"weight": "mxfp4"}),
        ({"gradient": "mxfp4", "gradient_rounding": "stochastic"}, {"gradient": "mxfp4"}),
        ({"gradient": "mxfp4", "hadamard": "dw"}, {"gradient": "mxfp4"}),
    ],
)
def test_choices_of_software_are_remedies(tmp_path: Path, remedy: dict, chip: dict) -> None:
    new, old = {"precision": remedy}, {"precision": chip}
    assert compare(arm(tmp_path, "new", 0.7, hardware=new), arm(tmp_path, "old", 0.5, hardware=old)).kind == "benefit"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"weight": "mxfp4"}, {"weight": "nvfp4"}),
        ({"weight": "nvfp4_block"}, {"weight": "nvfp4"}),
        ({"weight": "fp8_e4m3"}, {"weight": "fp8_e4m3_row"}),
        ({"weight": "bf16"}, {"weight": "fp16"}),
        ({"weight": "e2m1/16/e8m0"}, {"weight": "mxfp4"}),
        ({"weight": "mxfp6_e2m3"}, {"weight": "mxfp6_e3m2"}),
    ],
)
def test_other_units_are_another_chip(tmp_path: Path, one: dict, other: dict) -> None:
    new, old = {"precision": one}, {"precision": other}
    with pytest.raises(ConfigError, match="are deployed on different hardware"):
        compare(arm(tmp_path, "one", 0.5, hardware=new), arm(tmp_path, "other", 0.6, hardware=old))


def test_quantized_gradients_are_another_training(tmp_path: Path) -> None:
    gradient = {"precision": {"gradient": "mxfp4"}}
    assert compare(arm(tmp_path, "gradient", 0.5, hardware=gradient), arm(tmp_path, "plain", 0.7)).kind == "cost"
    both = {"precision": {"weight": "mxfp4", "gradient": "mxfp4"}}
    result = compare(arm(tmp_path, "three", 0.4, hardware=both), arm(tmp_path, "two", 0.7, hardware=MXFP4))
    assert (result.kind, result.verdict) == ("training", "trains worse")


def test_phases_are_another_training_where_they_are_deployed_alike(tmp_path: Path) -> None:
    formats = MXFP4["precision"]
    unified = arm(tmp_path, "unified", 0.7, hardware=MXFP4)
    for name, phases in {
        "rollouts": {"rollout": {"precision": formats}},
        "evaluation": {"evaluation": {"precision": formats}},
        "backward": {"precision": formats, "training": {"matmul_noise": {"relative_std": 0.1, "forward": False}}},
    }.items():
        result = compare(unified, arm(tmp_path, name, 0.5, hardware=phases))
        assert (result.kind, result.verdict) == ("training", "trains better"), name
    clean = {"precision": formats, "evaluation": {"precision": {"weight": "none"}}}
    with pytest.raises(ConfigError, match="are deployed on different hardware"):
        compare(unified, arm(tmp_path, "clean", 0.5, hardware=clean))


def test_equal_arms_show_no_benefit(tmp_path: Path) -> None:
    result = compare(arm(tmp_path, "a", 0.5, aqn=AQN), arm(tmp_path, "b", 0.5))
    assert (result.deployed.estimate, result.verdict) == (0.0, "no benefit shown")


@pytest.mark.parametrize(("seeds", "verdict"), [(1, "one run: not testable"), (2, "two runs: not testable")])
def test_below_three_seeds_there_is_no_p(tmp_path: Path, seeds: int, verdict: str) -> None:
    new, old = arm(tmp_path, "a", 0.9, seeds=seeds, aqn=AQN), arm(tmp_path, "b", 0.1, seeds=seeds)
    result = compare(new, old)
    assert (result.verdict, result.deployed.p, result.is_shown) == (verdict, None, False)


def test_only_seeds_that_both_completed_are_paired(tmp_path: Path) -> None:
    new, old = arm(tmp_path, "a", 0.6, seeds=5, aqn=AQN), arm(tmp_path, "b", 0.5, seeds=4)
    assert compare(new, old[1:]).seeds == (1, 2, 3)


def test_other_hardware_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deployed on different hardware"):
        compare(arm(tmp_path, "a", 0.6, hardware=NOISE), arm(tmp_path, "b", 0.5, hardware=MXFP4))


def test_other_problems_are_refused(tmp_path: Path) -> None:
    new, old = arm(tmp_path, "a", 0.6, problems=200, aqn=AQN), arm(tmp_path, "b", 0.5, problems=150)
    with pytest.raises(ConfigError, match=r"different problems \(200 and 150, 150 ids in common\)"):
        compare(new, old)


def test_another_model_is_refused(tmp_path: Path) -> None:
    other = profile().model_copy(update={"model": "another"})
    with pytest.raises(ConfigError, match="start from the same model"):
        compare(arm(tmp_path, "a", 0.6, aqn=AQN), arm(tmp_path, "b", 0.5, scale=other))


def test_no_seed_in_common_is_refused(tmp_path: Path) -> None:
    new, old = arm(tmp_path, "a", 0.6, aqn=AQN), arm(tmp_path, "b", 0.5)
    with pytest.raises(ConfigError, match=r"no complete seed in common \(seeds 0, 1 and seeds 2, 3\)"):
        compare(new[:2], old[2:])


def test_runs_without_a_final_score_are_refused(tmp_path: Path) -> None:
    what, solved = experiment("early"), np.ones(50)
    write_run(tmp_path / "early", what, 0, solved, solved, steps=40, reached=20, state="interrupted")
    early = find_runs([tmp_path / "early"])[0]
    with pytest.raises(ConfigError, match="no complete run"):
        compare(early, arm(tmp_path, "b", 0.5))


def test_an_arm_of_two_settings_is_refused(tmp_path: Path) -> None:
    mixed = [*arm(tmp_path, "a", 0.6), *arm(tmp_path, "b", 0.6, aqn=AQN)]
    with pytest.raises(ConfigError, match="treatment must be runs of one experiment"):
        compare(mixed, mixed)
