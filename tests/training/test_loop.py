"""The loop on the embedded model: what it records, what it replays, what it refuses."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from roundoff.config import Experiment, Profile
from roundoff.experiments import families, load_experiment
from roundoff.launch.request import RunRequest, execute, job_of
from roundoff.numerics.backend import computed_by
from roundoff.report.sources import find_sources
from roundoff.runs.directory import RunDirectory
from roundoff.runs.health import FailedRewardsError, NonFiniteOutputError
from roundoff.runs.record import read_run
from roundoff.tasks import make_task
from roundoff.trackers import NullTracker
from roundoff.training.loop import train
from roundoff.training.loss import policy_loss
from roundoff.training.update import NonFiniteLossError
from tests.broken_models import overflowing_model

training = importlib.import_module("roundoff.training.loop")  # `roundoff.training.loop` is the function


def with_training(profile: Profile, **changes) -> Profile:
    return profile.model_copy(update={"training": profile.training.model_copy(update=changes)})


def with_algorithm(experiment: Experiment, **changes) -> Experiment:
    return experiment.model_copy(update={"algorithm": experiment.algorithm.model_copy(update=changes)})


def run(root: Path, experiment: Experiment, profile: Profile, *, seed: int = 0, stop_after: int | None = None):
    steps = iter(range(1, 1000))
    with RunDirectory(root, experiment, profile, seed) as run_dir:
        train(
            experiment,
            profile,
            seed,
            run_dir,
            lambda start: NullTracker(),
            provenance={},
            should_stop=lambda: next(steps) == stop_after,
        )
    return read_run(run_dir.path)


def reproducible(path: Path) -> list[dict]:
    """Metrics without the keys that tell time."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("name", ["quickstart-mxfp4", "quickstart-noise-aqn"])
def test_torchs_settings_change_no_bit_of_a_run(tmp_path, small, name):
    usual = run(tmp_path / "usual", load_experiment(name), small)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        other = run(tmp_path / "other", load_experiment(name), small)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert reproducible(other.path) == reproducible(usual.path)


@pytest.mark.parametrize("name", families()["quickstart"])
def test_quickstart_runs_two_steps_and_evaluates_the_last(tmp_path, small, name):
    finished = run(tmp_path, load_experiment(name).model_copy(update={"epochs": 1}), small)
    assert finished.is_final
    assert finished.evaluated_steps == (0, 2)  # evaluate_every is 5: first and last are scored all the same
    assert [row["step"] for row in finished.metrics] == [0, 1, 2]
    assert all(len(finished.evaluation(s).outcomes) == 32 for s in (0, 2))
    last = finished.metrics[-1]
    assert last["deployed"] == finished.evaluation(2).deployed
    assert last["clean"] == finished.evaluation(2).clean
    assert all(math.isfinite(v) for v in last.values() if isinstance(v, float))


def test_plain_arithmetic_has_one_score(tmp_path, small):
    outcomes = run(tmp_path, load_experiment("quickstart-clean"), small).evaluation(2).outcomes
    assert all(o.deployed == (o.clean,) and o.response == o.clean_response for o in outcomes)


def test_a_run_records_what_computed_it(tmp_path, small):
    finished = run(tmp_path, load_experiment("quickstart-clean"), small)
    assert finished.provenance["kernels"] == computed_by(torch.ones(1))
    (source,) = find_sources([finished])
    assert source.machine.endswith(f"kernels for {computed_by(torch.ones(1))}")


def test_noisy_hardware_has_two_and_averages_its_draws(tmp_path, small):
    finished = run(tmp_path, load_experiment("quickstart-noise"), with_training(small, noise_draws=3))
    outcomes = finished.evaluation(2).outcomes
    assert all(len(o.deployed) == 3 for o in outcomes)
    assert any(o.response != o.clean_response for o in outcomes)


def test_same_run_twice_gives_the_same_bits(tmp_path, small):
    experiment = load_experiment("quickstart-noise-aqn")
    first, second = (run(tmp_path / name, experiment, small) for name in ("a", "b"))
    assert reproducible(first.path) == reproducible(second.path)
    assert first.evaluation(2) == second.evaluation(2)
    other = run(tmp_path / "c", experiment, small, seed=1)
    assert reproducible(first.path) != reproducible(other.path)


@pytest.mark.parametrize("name", ["quickstart-noise-aqn", "quickstart-mxfp4"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, small, name):
    experiment, profile = load_experiment(name), small
    whole = run(tmp_path / "whole", experiment, profile)
    stopped = run(tmp_path / "parts", experiment, profile, stop_after=1)
    assert (stopped.status.state, stopped.status.step) == ("interrupted", 1)
    resumed = run(tmp_path / "parts", experiment, profile)
    assert resumed.is_final
    assert reproducible(resumed.path) == reproducible(whole.path)
    assert resumed.evaluation(2) == whole.evaluation(2)
    files = [r.path / "checkpoints" / "step-000002" / "model.safetensors" for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_complete_run_is_not_trained_again(tmp_path, small):
    first = run(tmp_path, load_experiment("quickstart-clean"), small)
    before = (first.path / "metrics.jsonl").read_bytes()
    again = run(tmp_path, load_experiment("quickstart-clean"), small)
    assert (again.path / "metrics.jsonl").read_bytes() == before
    assert again.status.state == "complete"


def test_ratio_before_the_update_is_one_only_if_replayed(tmp_path, small):
    rows = {}
    for ratio in ("replayed", "recomputed", "rollout", "one"):
        experiment = with_algorithm(load_experiment("quickstart-noise"), ratio=ratio)
        rows[ratio] = run(tmp_path / ratio, experiment, with_training(small, minibatches=1)).metrics[1]
    for ratio in ("replayed", "one"):
        assert (rows[ratio]["ratio_mean"], rows[ratio]["ratio_std"], rows[ratio]["ratio_ess"]) == (1.0, 0.0, 1.0)
    for ratio in ("recomputed", "rollout"):
        assert rows[ratio]["ratio_std"] > 0.05
        assert rows[ratio]["ratio_ess"] < 0.999


def test_a_noisy_ratio_clips_before_anything_was_learned(tmp_path, small):
    profile = with_training(small, minibatches=1)
    clipped = {}
    for ratio in ("replayed", "recomputed"):
        experiment = with_algorithm(load_experiment("quickstart-noise"), ratio=ratio)
        clipped[ratio] = run(tmp_path / ratio, experiment, profile).metrics[1]["clip_fraction"]
    assert clipped["replayed"] == 0
    assert clipped["recomputed"] > 0


class SameReward:
    """A task whose every response earns the same."""

    def __init__(self, task, reward):
        self.name, self.train, self.test = task.name, task.train, task.test
        self._reward = reward

    def reward(self, problem, response):
        if isinstance(self._reward, Exception):
            raise self._reward
        return self._reward


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path, small, monkeypatch):
    real = policy_loss

    def broken(*arguments, **options):
        output = real(*arguments, **options)
        return type(output)(**{**{n: getattr(output, n) for n in output.__slots__}, "loss": output.loss * math.nan})

    monkeypatch.setattr("roundoff.training.update.policy_loss", broken)
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, load_experiment("quickstart-clean"), small)
    path = next(tmp_path.rglob("seed-0"))
    assert read_run(path).status.state == "failed"
    assert "NonFiniteLossError" in read_run(path).status.reason
    saved = json.loads(next((path / "diagnostics").iterdir()).read_text())
    assert saved["step"] == 1
    assert len(saved["texts"]) == 64


def overflowing(sigma: float = 1e38) -> Experiment:
    """AQN so large that every rollout overflows; scores, which never carry it, are those of the plain model."""
    experiment = load_experiment("quickstart-noise-aqn")
    aqn = experiment.aqn.model_copy(update={"sigma_start": sigma, "sigma_end": sigma, "schedule": "constant"})
    return experiment.model_copy(update={"aqn": aqn})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_whose_rollouts_cannot_be_computed_is_stopped_and_names_the_layer(tmp_path, small):
    with pytest.raises(NonFiniteOutputError, match=r"no rollout of 2 steps in a row .* first in model\.layers\.0"):
        run(tmp_path, overflowing(), small)
    status = read_run(next(tmp_path.rglob("seed-0"))).status
    assert status.state == "failed"
    assert "the logits were not finite" in status.reason
    assert any("step 1: 64 rollouts were not computed" in line for line in status.warnings)
    assert any("NaN or infinite" in line for line in status.warnings)  # the pre-flight saw it coming


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_recovers_from_such_a_step_goes_on(tmp_path, small, monkeypatch):
    real, bad = training.sample, iter([True, False])

    def spoilt(*arguments, **options):
        found = real(*arguments, **options)
        found.nonfinite[:] = next(bad)
        return found

    monkeypatch.setattr(training, "sample", spoilt)
    finished = run(tmp_path, load_experiment("quickstart-clean"), small)
    assert finished.is_final
    assert (finished.status.trained_steps, finished.status.untrained) == (1, "")
    assert finished.health.notes()[0].startswith("64 of 128 rollouts were not computed")
    assert finished.health.notes()[0] in finished.status.warnings


def test_a_run_in_which_every_reward_is_equal_says_that_nothing_was_trained(tmp_path, small, monkeypatch):
    real = make_task(small)
    monkeypatch.setattr("roundoff.training.checks.make_task", lambda profile: SameReward(real, 1.0))
    request = RunRequest(load_experiment("quickstart-clean"), small, 0, tmp_path, {}, tracker="jsonl")
    said = "nothing was trained in 2 steps: the rewards within each group were equal"
    assert execute(request, lambda: False) == ("complete", said)
    status = read_run(request.path).status
    assert (status.state, status.trained_steps, status.untrained) == ("complete", 0, said)
    assert json.loads((request.path / "scalars.jsonl").read_text().splitlines()[-1]) == {"ended": "untrained"}
    assert job_of(request).is_untrained
    assert execute(request, lambda: False) == ("complete", f"was complete; {said}")


@pytest.mark.parametrize("reward", [RuntimeError("no"), math.nan])
def test_a_reward_that_always_fails_stops_the_run_before_its_first_step(tmp_path, small, monkeypatch, reward):
    real = make_task(small)
    monkeypatch.setattr("roundoff.training.checks.make_task", lambda profile: SameReward(real, reward))
    with pytest.raises(FailedRewardsError, match="the reward failed for every one of 32 responses"):
        run(tmp_path, load_experiment("quickstart-clean"), small)
    assert read_run(next(tmp_path.rglob("seed-0"))).metrics == ()


def test_a_reward_that_fails_on_every_rollout_stops_the_run(tmp_path, small, monkeypatch):
    real = make_task(small)
    training_ids = {problem.id for problem in real.train()}

    class TestOnly(SameReward):
        def reward(self, problem, response):
            return math.nan if problem.id in training_ids else 1.0

    monkeypatch.setattr("roundoff.training.checks.make_task", lambda profile: TestOnly(real, 1.0))
    with (
        pytest.warns(UserWarning, match="the rewards of 64 rollouts failed"),
        pytest.raises(FailedRewardsError, match="failed for every rollout of 2 steps in a row"),
    ):
        run(tmp_path, load_experiment("quickstart-clean"), small)


def test_a_model_that_is_broken_is_not_trained(tmp_path, small):
    directory = overflowing_model(tmp_path / "model")
    with pytest.raises(NonFiniteOutputError, match=r"with the hardware off, first in model\.layers\.1\.mlp\.up_proj"):
        run(tmp_path, load_experiment("quickstart-noise"), small.model_copy(update={"model": str(directory)}))
    found = read_run(next(tmp_path.rglob("seed-0")))
    assert (found.status.state, found.metrics) == ("failed", ())


def test_a_metric_that_is_not_finite_is_null_and_warned_of(tmp_path, small, monkeypatch):
    real = training.update
    monkeypatch.setattr(training, "update", lambda *arguments: real(*arguments) | {"entropy": math.nan})
    with pytest.warns(UserWarning, match=r"step 1: entropy is not finite \(null in metrics\.jsonl\)"):
        finished = run(tmp_path, load_experiment("quickstart-clean"), small)
    lines = (finished.path / "metrics.jsonl").read_text().splitlines()

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert [json.loads(line, parse_constant=refused).get("entropy", 0) for line in lines] == [0, None, None]
    assert sum("entropy is not finite" in line for line in finished.status.warnings) == 1
