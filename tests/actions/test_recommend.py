"""`roundoff recommend`: which rows of the studies concern a hardware, and what is said of them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from roundoff.actions import recommend
from roundoff.actions.recommend import changed_settings, findings
from roundoff.cli import cli
from roundoff.config import Hardware
from roundoff.experiments import Evidence, evidence, load_experiment
from roundoff.experiments.evidence import Measured, as_csv, parse

NONE = Measured(0.4, -1.0, 1.8, 1.0)


def row(experiment: str, points: float, p: float, *, spread: float = 1.0) -> Evidence:
    baseline = load_experiment(experiment).baseline
    assert baseline is not None
    measured = Measured(points, points - spread, points + spread, p)
    return Evidence(experiment, baseline, "tiny", 5, 1024, 40, measured, NONE)


ROWS = (
    row("remedies-mxfp4", -8.0, 0.0001),
    row("remedies-mxfp4-hadamard", 3.0, 0.01),
    row("remedies-mxfp4-aqn", -3.0, 0.02),
    row("remedies-mxfp4-2d", 2.0, 0.3),
    row("remedies-mxfp4-stochastic", 0.5, 1.0),
    row("remedies-nvfp4-hadamard", 9.0, 0.001),
    row("mismatch-mxfp4-unified", 4.0, 0.01),
    row("remedies-noise5-one", 6.0, 0.001),
)


@pytest.fixture
def studied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "evidence", lambda: ROWS)


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["recommend", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def hardware(**precision: str) -> Hardware:
    return Hardware.model_validate({"precision": precision})


def test_rows_of_the_same_chip_come_first_then_those_deployed_alike() -> None:
    complete = hardware(weight="mxfp4", activation="mxfp4", gradient="mxfp4")
    found = [(one.row.experiment, one.match) for one in findings(complete, ROWS)]
    assert found == [
        ("remedies-mxfp4-hadamard", "trained"),
        ("remedies-mxfp4-2d", "trained"),
        ("remedies-mxfp4-stochastic", "trained"),
        ("remedies-mxfp4-aqn", "trained"),
        ("mismatch-mxfp4-unified", "deployed"),
    ]
    forward = hardware(weight="mxfp4", activation="mxfp4")
    assert {one.match for one in findings(forward, ROWS)} == {"deployed"}


def test_another_level_of_noise_is_another_chip() -> None:
    assert not findings(Hardware.model_validate({"matmul_noise": {"relative_std": 0.04}}), ROWS)
    found = findings(Hardware.model_validate({"matmul_noise": {"relative_std": 0.05}}), ROWS)
    assert [one.row.experiment for one in found] == ["remedies-noise5-one"]


@pytest.mark.usefixtures("studied")
def test_what_helped_is_named_with_its_evidence_and_what_to_set() -> None:
    text = said("remedies-mxfp4")
    assert "MXFP4 complete: −8.0 [−9.0, −7.0], p < 0.001 against plain arithmetic" in text
    assert "2 of 5 remedies helped on remedies-mxfp4:" in text
    assert "MXFP4 complete, Hadamard transform on dW: +3.0 [+2.0, +4.0], p 0.010\n    --set hardware" in text
    assert "--set hardware.precision.hadamard=dw" in text
    hurt, hint, rest = (text.index(t) for t in ("Shown to hurt", "Only a hint", "No effect shown"))
    assert hurt < text.index("AQN on the norms") < hint < text.index("square blocks") < rest < text.index("at random")
    assert "Measured with model tiny on arithmetic, 5 seeds, 1,024 test problems" in text


@pytest.mark.usefixtures("studied")
def test_nothing_is_recommended_where_nothing_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "evidence", lambda: ROWS[2:5])
    text = said("remedies-mxfp4")
    assert "None of 3 remedies is shown to help on remedies-mxfp4." in text
    assert "--set" not in text


@pytest.mark.usefixtures("studied")
def test_hardware_that_no_study_has_is_told_from_hardware_that_nothing_helps() -> None:
    text = said("int4")
    assert "No study has measured a remedy on int4." in text
    assert "  remedies-nvfp4                NVFP4 complete" in text


def test_plain_arithmetic_and_unknown_names_are_refused() -> None:
    for name, reason in (("none", "needs no remedy"), ("mxfp5", "did you mean")):
        result = CliRunner().invoke(cli, ["recommend", name])
        assert result.exit_code != 0
        assert reason in str(result.exception) + result.output


@pytest.mark.usefixtures("studied")
def test_the_evidence_is_written_on_request(tmp_path: Path) -> None:
    said("remedies-mxfp4", "--json", str(tmp_path / "out.json"))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["findings"][0]["experiment"] == "remedies-mxfp4-hadamard"
    assert content["findings"][0]["settings"] == ["hardware.precision.hadamard=dw"]


def test_settings_that_a_remedy_takes_away_are_said() -> None:
    elsewhere, complete = load_experiment("remedies-hif4-elsewhere"), load_experiment("remedies-hif4")
    assert "hardware.precision.gradient=none" in changed_settings(elsewhere, complete)
    assert "hardware.evaluation.precision.weight=hif4" in changed_settings(elsewhere, complete)


def test_the_table_is_read_as_it_was_written() -> None:
    assert parse(as_csv(ROWS)) == ROWS
    with pytest.raises(ValueError, match="lacks a column: 'clean_p'"):
        parse(as_csv(ROWS).replace("clean_p\n", "clean_q\n"))


def test_packaged_evidence_is_of_declared_experiments() -> None:
    for one in evidence():
        assert load_experiment(one.experiment).baseline == one.baseline
        assert one.seeds >= 3
        for measured in (one.deployed, one.clean):
            assert measured.low <= measured.points <= measured.high
            assert 0 <= measured.p <= 1
