"""The sigma curves of AQN, against the reference curves and by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from roundoff.aqn.schedule import aqn_sigma, sigma_curve
from roundoff.config import AQN, ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "aqn_sigma.json").read_text())
CURVES = [(schedule, curve) for schedule, curves in GOLDEN.items() for curve in curves]


@pytest.mark.parametrize(("schedule", "curve"), CURVES)
def test_golden_curves_are_equal_to_the_bit(schedule, curve):
    stages = curve["stages"] if schedule == "global" else curve["stages_per_epoch"]
    aqn = AQN(sigma_start=curve["sigma_start"], sigma_end=curve["sigma_end"], schedule=schedule, stages=stages)
    total = len(curve["sigma"])
    assert total == curve.get("total_steps") or total == curve["epochs"] * curve["steps_per_epoch"]
    assert sigma_curve(total, curve.get("steps_per_epoch", total), aqn) == curve["sigma"]


def test_global_by_hand():
    aqn = AQN(sigma_start=0.1, sigma_end=0.001, schedule="global", stages=4)
    expected = [0, 0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert sigma_curve(8, 8, aqn) == pytest.approx(expected, rel=1e-12)


def test_epoch_by_hand():
    # Two epochs of 3 steps, 2 noisy intervals each: silent, then the ends of the epoch's share of the decay.
    # The shares are 1 -> 0.1 and 0.1 -> 0.01.
    aqn = AQN(sigma_start=1.0, sigma_end=0.01, schedule="epoch", stages=2)
    assert sigma_curve(6, 3, aqn) == pytest.approx([0, 1, 0.1, 0, 0.1, 0.01], rel=1e-12)


def test_an_unfinished_epoch_counts_as_a_full_one():
    aqn = AQN(sigma_start=1.0, sigma_end=0.01, schedule="epoch", stages=2)
    assert sigma_curve(5, 3, aqn) == sigma_curve(6, 3, aqn)[:5]


def test_one_stage_per_epoch_takes_the_start_of_the_share():
    aqn = AQN(sigma_start=1.0, sigma_end=0.01, schedule="epoch", stages=1)
    assert sigma_curve(4, 2, aqn) == pytest.approx([0, 1, 0, 0.1], rel=1e-12)


def test_smooth_schedules_by_hand():
    def curve(schedule):
        return sigma_curve(5, 5, AQN(sigma_start=0.4, sigma_end=0.2, schedule=schedule))

    assert curve("constant") == [0.4] * 5
    assert curve("linear") == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2], rel=1e-12)
    quarter = 0.3 + 0.1 * math.sqrt(0.5)
    assert curve("cosine") == pytest.approx([0.4, quarter, 0.3, 0.6 - quarter, 0.2], rel=1e-12)


def test_one_step_of_the_smooth_schedules_is_sigma_start():
    for schedule in ("linear", "cosine", "constant"):
        assert sigma_curve(1, 1, AQN(sigma_start=0.4, sigma_end=0.2, schedule=schedule)) == [0.4]


@pytest.mark.parametrize(("schedule", "total", "per_epoch"), [("global", 1, 1), ("epoch", 4, 1), ("epoch", 1, 50)])
def test_a_curve_of_zeros_is_an_error(schedule, total, per_epoch):
    aqn = AQN(sigma_start=0.1, sigma_end=0.1, schedule=schedule, stages=5)
    with pytest.raises(ConfigError, match="never inject noise"):
        sigma_curve(total, per_epoch, aqn)


@pytest.mark.parametrize(("step", "total", "per_epoch"), [(-1, 4, 2), (4, 4, 2), (0, 0, 2), (0, 4, 0)])
def test_steps_outside_the_run_are_errors(step, total, per_epoch):
    with pytest.raises(ValueError, match=r"step"):
        aqn_sigma(step, total, per_epoch, AQN(sigma_start=0.1, sigma_end=0.1))


def test_the_module_does_not_import_torch():
    code = "import sys, roundoff.aqn.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
