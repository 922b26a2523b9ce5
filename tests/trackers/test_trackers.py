"""Names of trackers, several at once, and the guard: whatever a tracker does, the run goes on."""

import json
import math
import warnings

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import experiment_ids, load_experiment
from roundoff.launch.local import run_grid
from roundoff.launch.request import RunRequest
from roundoff.runs.metrics import METRICS
from roundoff.runs.record import read_run
from roundoff.trackers import TRACKERS, WandbSettings, check_trackers, open_trackers, scalars
from roundoff.trackers.base import hyper_parameters
from tests.simulated import experiment, profile
from tests.trackers.runs import log_steps, tracked


class Broken:
    """A tracker that fails at the third step and at every later call."""

    def __init__(self, run):
        self.calls = 0

    def log(self, step, values):
        self.calls += 1
        if self.calls > 2:
            raise OSError("the server is gone")

    def close(self, ended):
        raise AssertionError("a tracker that failed must not be called again")


def test_names_come_from_the_configuration(tmp_path):
    run = tracked(tmp_path, seed=3)
    assert run.name == "noisy seed 3"
    assert run.group == tracked(tmp_path, seed=4).group
    assert run.group != tracked(tmp_path, epochs=2).group
    assert run.group.startswith("noisy/tiny-")


def test_every_run_has_the_same_hyper_parameters(tmp_path):
    plain = hyper_parameters(experiment("a"), profile())
    full = hyper_parameters(
        experiment(
            "b",
            aqn={"sigma_start": 0.05, "sigma_end": 0.01, "layers": "zone"},
            srdd={},
            lora={},
            hardware={
                "precision": {"weight": "mxfp4", "keep": [0]},
                "deadzone": {"threshold": 0.1, "layers": [1]},
                "accumulator": {"bits": 13},
                "faults": [{"kind": "gain", "layer": 0, "amount": 0.1, "module": "mlp.up_proj"}],
                "rollout": {"matmul_noise": {"relative_std": 0.1}},
                "evaluation": {"precision": "none"},
            },
            algorithm={"name": "GRPO", "ratio": "recomputed", "correction": {"rollout_is": "token"}},
        ),
        profile(),
    )
    assert list(plain) == list(full)
    assert (plain["aqn.sigma_start"], full["aqn.sigma_start"]) == (None, 0.05)
    assert full["hardware.precision.keep"] == "[0]"
    noise = "hardware.rollout.matmul_noise.relative_std"
    assert (plain[noise], full[noise], full["hardware.evaluation.precision.weight"]) == (None, 0.1, "none")
    assert (plain["algorithm.correction.rollout_is"], full["algorithm.correction.rollout_is"]) == (None, "token")
    assert (plain["hardware.accumulator.bits"], full["hardware.accumulator.bits"]) == (None, 13)
    assert plain["hardware.faults"] == "[]" and "mlp.up_proj" in full["hardware.faults"]
    assert not {"id", "title", "experiment.id"} & set(plain)


def test_every_declared_experiment_has_the_same_hyper_parameters():
    """TensorBoard shows the columns of the first run that it reads."""
    first, *others = (hyper_parameters(load_experiment(name), profile()) for name in experiment_ids())
    assert all(list(other) == list(first) for other in others)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandbb", "did you mean 'wandb'?"),
        ("", "must name each tracker once"),
        ("none,jsonl", "must name each tracker once"),
        ("jsonl,jsonl", "must name each tracker once"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(names, message):
    with pytest.raises(ConfigError, match="--tracker") as refused:
        check_trackers(names, WandbSettings())
    assert message in str(refused.value)


def test_jsonl_holds_settings_steps_and_end(tmp_path):
    tracker = open_trackers("jsonl", tracked(tmp_path))
    log_steps(tracker, 0, 3)
    tracker.close("interrupted")
    again = open_trackers("jsonl", tracked(tmp_path, resumed_from=2))
    log_steps(again, 3, 4)
    again.close("complete")
    head, *lines = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert (head["run"], head["settings"]["experiment"]["id"]) == ("noisy seed 0", "noisy")
    assert [line.get("step") for line in lines] == [0, 1, 2, 3, 4, None]
    assert lines[-1] == {"ended": "complete"}


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    tracker = open_trackers("jsonl", tracked(tmp_path))
    log_steps(tracker, 0, 1)
    with (tmp_path / "scalars.jsonl").open("a") as file:
        file.write('{"step": 2, "depl')
    log_steps(open_trackers("jsonl", tracked(tmp_path, resumed_from=1)), 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines[1:]] == [0, 1, 2]


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    tracker = open_trackers("broken,jsonl", tracked(tmp_path))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log_steps(tracker, 0, 5)
        tracker.close("complete")
    assert [str(w.message) for w in seen] == [
        "tracker broken failed and is now off; the run goes on: the server is gone"
    ]
    assert len((tmp_path / "scalars.jsonl").read_text().splitlines()) == 8


def test_a_tracker_that_cannot_be_created_stops_nothing(tmp_path, monkeypatch):
    def refuse(run):
        raise RuntimeError

    monkeypatch.setitem(TRACKERS, "refuse", refuse)
    with pytest.warns(UserWarning, match="tracker refuse failed and is now off; the run goes on: RuntimeError"):
        log_steps(open_trackers("refuse", tracked(tmp_path)), 0, 1)


def test_a_run_completes_though_its_tracker_cannot_write(tmp_path, small):
    """If a directory is in the place of the file, the run is complete and its warning is plain text."""
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="jsonl,tensorboard")
    (request.path / "scalars.jsonl").mkdir(parents=True)
    (job,) = run_grid([request], workers=1)
    assert job.phase == "complete"
    assert [text.split(":")[0] for text in job.warnings] == ["tracker jsonl failed and is now off; the run goes on"]
    assert read_run(request.path).is_final
    assert list((request.path / "tensorboard").iterdir())


def test_a_number_that_is_not_finite_reaches_every_tracker_and_the_file_stays_json(tmp_path):
    """Trackers get NaN, which they show as such; the file has null, because JSON has no NaN."""
    row = {"step": 1, "time": "now", "entropy": math.nan, "kl": None, "loss": 0.5, "sigma_layers": [0.1, math.inf]}
    values = scalars(row)
    assert math.isnan(values["entropy"]) and math.isnan(values["kl"])
    tracker = open_trackers("jsonl", tracked(tmp_path))
    tracker.log(1, values)
    tracker.close("untrained")

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refused) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "step": 1,
        "entropy": None,
        "kl": None,
        "loss": 0.5,
        "sigma/layer.0": 0.1,
        "sigma/layer.1": None,
    }
    assert lines[2] == {"ended": "untrained"}


def test_values_by_length_become_a_scalar_for_each_class_that_has_one():
    row = {"step": 1, "mismatch_k3_kl_lengths": [None, 0.25, math.nan], "sigma_layers": [0.1]}
    values = scalars(row)
    assert list(values) == ["mismatch_k3_kl/length.2", "mismatch_k3_kl/length.4", "sigma/layer.0"]
    assert values["mismatch_k3_kl/length.2"] == 0.25


def test_what_corrections_report_reaches_trackers_of_the_runs_that_have_it():
    of_corrections = {name: 0.5 for name in METRICS if name.startswith(("rollout_is_", "rollout_rs_"))}
    assert len(of_corrections) == 7
    assert scalars({"step": 1, "loss": 0.25, **of_corrections}) == {"loss": 0.25, **of_corrections}
