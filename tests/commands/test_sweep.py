"""`roundoff sweep` and what `run` checks before anything begins."""

import pytest
from click.testing import CliRunner

from roundoff.cli import cli
from roundoff.config import ConfigError
from roundoff.launch.request import Job, execute
from roundoff.runs.record import find_runs
from roundoff.tasks import TaskError

SMALL = [
    "--set=profile.task.settings.train_problems=16",
    "--set=profile.task.settings.test_problems=32",
    "--set=profile.training.prompts_per_step=8",
    "--tracker=none",
]


def run_here(requests, *, workers, watch):
    """`run_grid` without processes."""
    return [Job(request, *execute(request, lambda: False)) for request in requests]


def test_a_sweep_runs_every_variant_and_prints_one_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr("roundoff.actions.run.run_grid", run_here)
    arguments = ["sweep", "quickstart-noise-aqn", "--set", "aqn.sigma_start=0.05,0.2", "--seeds", "0"]
    shown = CliRunner().invoke(cli, [*arguments, *SMALL, "--runs", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "3 variants and baselines x 1 seeds: 3 runs" in shown.output
    assert "sigma_start=0.2" in shown.output
    assert "one run: not testable" in shown.output
    runs, _ = find_runs([tmp_path])
    assert {run.experiment.id: run.is_final for run in runs} == {
        "quickstart-noise": True,
        "quickstart-noise-aqn": True,
        "quickstart-noise-aqn+sigma_start=0.2": True,
    }
    assert {run.profile.name for run in runs} == {
        "tiny+train_problems=16,test_problems=32,prompts_per_step=8",
    }


def test_a_sweep_under_torchrun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("roundoff.actions.sweep.launched", lambda: True)
    arguments = ["sweep", "quickstart-noise-aqn", "--set", "aqn.sigma_start=0.05,0.2", "--runs", str(tmp_path)]
    shown = CliRunner().invoke(cli, arguments)
    assert isinstance(shown.exception, ConfigError)
    assert "--workers or --ray" in str(shown.exception)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("profile.task.settings.terms_min=1", "terms_min"),
        ("profile.task.settings.terms=3", "terms"),
        ("profile.task.name=arithmetc", "arithmetic"),
    ],
)
def test_a_wrong_task_is_refused_before_a_run_begins(tmp_path, setting, expected):
    arguments = ["run", "quickstart-clean", "--set", setting, "--runs", str(tmp_path / "runs"), "--tracker", "none"]
    shown = CliRunner().invoke(cli, arguments)
    assert isinstance(shown.exception, TaskError | ConfigError)
    assert expected in str(shown.exception)
    assert not (tmp_path / "runs").exists()
