"""What would stop a run is found before its directory is made: settings of hardware that reach nothing in the model."""

from pathlib import Path

import pytest

from roundoff.experiments import load_experiment, load_profile, with_overrides
from roundoff.launch.readiness import obstacles
from roundoff.launch.request import RunRequest
from tests.program import roundoff


def reason(*assignments: str) -> str:
    experiments, profile = with_overrides([load_experiment("quickstart-mxfp4")], load_profile("tiny"), assignments)
    return obstacles([RunRequest(experiments[0], profile, 0, Path("nowhere"), {})])[0]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("hardware.precision.keep=[9]", "hardware.precision.keep names layer 9, which does not exist"),
        ("hardware.precision.keep=srdd:9", "keeps more layers than the model has (6)"),
        ("hardware.precision.keep=[0,1,2,3,4,5]", "keeps every layer in high precision"),
        ('hardware.training.exclude=["*"]', "hardware.training.exclude = ['*'] leaves no Linear to compute"),
        ('hardware.rules=[{match=["x"],precision={weight="int8"}}]', "hardware.rules.0.match names 'x'"),
        ("hardware.deadzone={threshold=0.1,layers=[7]}", "hardware.deadzone.layers names layer 7"),
        ('hardware.faults=[{kind="noise",layer=6,amount=0.1}]', "hardware.faults.0.layer names layer 6"),
    ],
)
def test_settings_that_reach_nothing_are_obstacles(assignment: str, said: str) -> None:
    assert said in reason(assignment)


def test_hardware_that_reaches_modules_is_none() -> None:
    assert reason("hardware.precision.keep=srdd:2") == ""
    assert reason('hardware.rules=[{match=["self_attn"],precision={kv_cache="fp8_e4m3"}}]') == ""
    assert reason("profile.model=owner/absent", "profile.allow_download=true") == ""


def test_no_directory_is_left_behind(tmp_path: Path) -> None:
    bad = ("--set", "hardware.precision.keep=[9]", "--seeds", "0", "--runs", "runs", "--tracker", "none")
    result = roundoff("run", "quickstart-mxfp4", *bad, cwd=tmp_path, check=2)
    assert "hardware.precision.keep names layer 9" in result.stderr
    assert not (tmp_path / "runs").exists()
