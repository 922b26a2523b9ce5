"""The loop on the embedded model: what it records, what it replays, what it refuses."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from roundoff.algorithms.loss import policy_loss
from roundoff.config import ConfigError, Experiment, Profile, validate
from roundoff.experiments import families, load_experiment
from roundoff.run_dir import RunDirectory, read_run
from roundoff.session import prepare
from roundoff.trackers import NullTracker
from roundoff.train import _sample_batch, train
from roundoff.update import NonFiniteLossError, _before_update, _logprobs, _minibatch_loss, _minibatches

training = importlib.import_module("roundoff.train")  # `roundoff.train` is the function


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


@pytest.fixture
def noisy(small):
    """A session on noisy hardware and the minibatches of its first step."""
    session = prepare(load_experiment("quickstart-noise"), small, 0)
    return session, _minibatches(session, _sample_batch(session, 1))


def test_replayed_log_probabilities_are_the_same_bits(noisy):
    session, parts = noisy
    key = session.key.fold("update", 1)
    for part, _, _ in parts:
        with torch.no_grad():
            old, _ = _logprobs(session, session.model, part, key)
        new, _ = _logprobs(session, session.model, part, key)  # with gradients: another path through every layer
        assert torch.equal(old, new.detach())


def test_the_shortcut_for_the_first_minibatch_changes_nothing(noisy):
    session, parts = noisy
    assert _before_update(session, 1, parts[0][0], first=True).old is None
    explicit = _before_update(session, 1, parts[0][0], first=False).old
    new, _ = _logprobs(session, session.model, parts[0][0], session.key.fold("update", 1))
    assert torch.equal(explicit, new.detach())


def test_recomputed_log_probabilities_meet_another_draw(noisy):
    session, parts = noisy
    session.experiment = with_algorithm(session.experiment, ratio="recomputed")
    old = _before_update(session, 1, parts[0][0], first=True).old
    new, _ = _logprobs(session, session.model, parts[0][0], session.key.fold("update", 1))
    mask = parts[0][0].response_mask
    assert ((old - new.detach()).abs()[mask] > 1e-3).float().mean() > 0.5


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


def test_ratio_one_makes_each_minibatch_a_batch_of_its_own(small):
    one = with_algorithm(load_experiment("quickstart-noise"), ratio="one")
    session, replayed = prepare(one, small, 0), prepare(load_experiment("quickstart-noise"), small, 0)
    inside, before = session.profile.training, small.training
    assert (inside.prompts_per_step, inside.minibatches) == (4, 1)
    assert (before.prompts_per_step, before.minibatches) == (8, 2)
    assert len(session.sigmas) * inside.minibatches == len(replayed.sigmas) * before.minibatches  # optimizer steps
    assert inside.evaluate_every * inside.prompts_per_step == before.evaluate_every * before.prompts_per_step


def test_oversampling_draws_more_prompts_at_a_time_and_trains_on_one_batch(small):
    settings = {**small.task.settings, "train_problems": 64}
    wide = small.model_copy(update={"task": small.task.model_copy(update={"settings": settings})})
    dapo = load_experiment("E8a")
    session = prepare(dapo, wide, 0)
    assert len(session.sigmas) == 64 // (8 * 2)
    batch = _sample_batch(session, 1)
    assert batch.prompts % 16 == 0
    assert len(batch.advantages) <= 8 * dapo.algorithm.group_size
    assert (batch.advantages.view(-1, dapo.algorithm.group_size) != 0).any(1).all()  # groups of equal reward are out


def test_a_noisy_ratio_clips_before_anything_was_learned(tmp_path, small):
    profile = with_training(small, minibatches=1)
    clipped = {}
    for ratio in ("replayed", "recomputed"):
        experiment = with_algorithm(load_experiment("quickstart-noise"), ratio=ratio)
        clipped[ratio] = run(tmp_path / ratio, experiment, profile).metrics[1]["clip_fraction"]
    assert clipped["replayed"] == 0
    assert clipped["recomputed"] > 0


def test_micro_batches_do_not_change_the_update(small):
    # on clean hardware: each product of the backward pass draws noise of its own
    whole, parts = (clean_update(small, micro_batch) for micro_batch in (0, 12))
    for name, value in whole.items():
        # sums of about 100 float32 products in another order: a few ulp of the largest term
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-5 * float(value.abs().max()))


def clean_update(profile: Profile, micro_batch: int) -> dict[str, torch.Tensor]:
    session = prepare(load_experiment("quickstart-clean"), with_training(profile, micro_batch=micro_batch), 0)
    parts = _minibatches(session, _sample_batch(session, 1))
    before = _before_update(session, 1, parts[0][0], first=True)
    _minibatch_loss(session, 1, *parts[0], before)
    return {n: p.grad.clone() for n, p in session.model.named_parameters()}


def test_aqn_leaves_the_weights_as_they_were(small):
    session = prepare(load_experiment("quickstart-noise-aqn"), small, 0)
    session.sigmas = [0.05, 0.05]
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    noisy = _sample_batch(session, 1)
    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters())
    session.sigmas = [0.0, 0.0]
    assert _sample_batch(session, 1).rollouts.texts != noisy.rollouts.texts


def gradients(session, minibatch):
    _minibatch_loss(session, 1, *minibatch, _before_update(session, 1, minibatch[0], first=True))
    session.optimizer.collect()
    found = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    for parameter in session.model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("kl", [0.0, 0.001])
def test_rollouts_without_advantage_are_passed_over_only_where_they_have_no_gradient(small, kl):
    experiment = with_algorithm(load_experiment("quickstart-clean"), kl_coefficient=kl)
    session = prepare(experiment, with_training(small, minibatches=1), 0)
    batch = _sample_batch(session, 1)
    count, useful = len(batch.advantages), int((batch.advantages != 0).sum())
    assert 0 < useful < count
    ((part, advantages, normalizer),) = _minibatches(session, batch)
    assert len(part) == (count if kl else useful)
    assert normalizer == batch.rollouts.response_mask.sum()  # all count
    expected = gradients(session, (batch.rollouts, batch.advantages, normalizer))
    for name, gradient in gradients(session, (part, advantages, normalizer)).items():
        # Sums of some hundred float32 terms in another order, relative to the largest element.
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * size)


def test_a_minibatch_in_which_nothing_teaches_moves_the_optimizer_on(small):
    session = prepare(with_algorithm(load_experiment("quickstart-clean"), kl_coefficient=0.0), small, 0)
    batch = _sample_batch(session, 1)
    half = len(batch.advantages) // 2
    batch.advantages[:half], batch.advantages[half:] = 0.0, 1.0
    parts = _minibatches(session, batch)
    assert [int((advantages != 0).sum() > 0) for _, advantages, _ in parts] == [0, 1]
    assert len(parts[0][0]) == session.algorithm.group_size


class SameReward:
    """A task whose every response earns the same."""

    def __init__(self, task, reward):
        self.name, self.train, self.test = task.name, task.train, task.test
        self._reward = reward

    def reward(self, problem, response):
        if isinstance(self._reward, Exception):
            raise self._reward
        return self._reward


def test_rollouts_whose_output_is_not_finite_are_counted_and_the_run_goes_on(small, monkeypatch):
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    six = session.tokenizer("6")["input_ids"][0]
    with torch.no_grad():  # whatever comes after a "6", in a prompt or a response, is not a number
        session.model.model.embed_tokens.weight[six] = math.nan
        session.reference.model.embed_tokens.weight[six] = math.nan
    session.task = SameReward(session.task, 0.0)
    monkeypatch.setattr(session.task, "reward", lambda problem, response: float(len(response) % 2))
    row = training.take_step(session, 1, None)
    assert 0 < row["nonfinite"] < 64
    assert row["trained"]
    others = [p for n, p in session.model.named_parameters() if "embed_tokens" not in n]
    assert all(p.isfinite().all() for p in others)
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize("name", ["quickstart-clean", "quickstart-dapo"])
def test_a_batch_without_a_usable_group_trains_nothing_and_is_counted(small, name):
    experiment = load_experiment("quickstart-clean")
    if name == "quickstart-dapo":
        content = {**experiment.model_dump(), "algorithm": {"name": "DAPO", "overlong_buffer": 0.0}}
        experiment = validate(Experiment, content, source="test")
    session = prepare(experiment, small, 0)
    session.task = SameReward(session.task, 1.0)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    row = training.take_step(session, 1, None)
    assert (row["trained"], row["mixed_groups"], row["accuracy"]) == (False, 0.0, 1.0)
    assert row["prompts"] == (8 if name == "quickstart-clean" else 5 * 8)  # DAPO: at most five batches, then it goes on
    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters())


@pytest.mark.parametrize("reward", [RuntimeError("no"), math.nan, math.inf])
def test_a_reward_that_fails_is_zero_and_counted(small, reward):
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    session.task = SameReward(session.task, reward)
    row = training.take_step(session, 1, None)
    assert (row["reward_errors"], row["accuracy"]) == (8 * 8, 0.0)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path, small, monkeypatch):
    real = policy_loss

    def broken(*arguments, **options):
        output = real(*arguments, **options)
        return type(output)(**{**{n: getattr(output, n) for n in output.__slots__}, "loss": output.loss * math.nan})

    monkeypatch.setattr("roundoff.update.policy_loss", broken)
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, load_experiment("quickstart-clean"), small)
    path = next(tmp_path.rglob("seed-0"))
    assert read_run(path).status.state == "failed"
    assert "NonFiniteLossError" in read_run(path).status.reason
    saved = json.loads(next((path / "diagnostics").iterdir()).read_text())
    assert saved["step"] == 1
    assert len(saved["texts"]) == 64


@pytest.mark.parametrize(
    ("experiment", "profile", "expected"),
    [
        ({}, {"minibatches": 9}, "minibatches must be at most prompts_per_step"),
        ({"algorithm": {"name": "GRPO", "ratio": "one"}}, {"minibatches": 3}, "must be a multiple of minibatches"),
        ({"algorithm": {"name": "DAPO", "oversampling": 3}}, {}, "oversampling = 3, but the task has only 16"),
        ({}, {"max_prompt_tokens": 3}, "max_prompt_tokens is 3, but 16 training prompts are longer"),
        ({}, {"max_prompt_tokens": 3, "long_prompts": "filter"}, "only 0 training prompts"),
        ({}, {"prompts_per_step": 17}, "only 16 training problems"),
        ({}, {"max_new_tokens": 10_000}, "max_new_tokens = 10000 do not fit into the .* positions of the model"),
        ({"hardware": {"precision": {"weight": "mxfp4"}, "exclude": ["*"]}}, {}, "no Linear"),
        ({"hardware": {"precision": {"weight": "mxfp4", "keep": [99]}}}, {}, "99"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, small, experiment, profile, expected):
    content = {**load_experiment("quickstart-clean").model_dump(exclude_none=True), **experiment}
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path, validate(Experiment, content, source="test"), with_training(small, **profile))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_prompts_that_are_too_long_are_left_out_where_that_is_set(small):
    prompts = [p.prompt for p in prepare(load_experiment("quickstart-clean"), small, 0).task.train()]
    limit = sorted(map(len, prompts))[8]  # the tokenizer is one of characters
    profile = with_training(small, max_prompt_tokens=limit, long_prompts="filter")
    kept = [p.prompt for p in prepare(load_experiment("quickstart-clean"), profile, 0).stream.problems]
    assert kept == [p for p in prompts if len(p) <= limit]
    assert 8 < len(kept) < 16


@pytest.mark.parametrize(("part", "message"), [("train", "has only 0 training problems"), ("test", "no test problems")])
def test_a_task_without_problems_is_refused(small, monkeypatch, part, message):
    task = prepare(load_experiment("quickstart-clean"), small, 0).task
    empty = SameReward(task, 1.0)
    setattr(empty, part, list)
    monkeypatch.setattr("roundoff.session.make_task", lambda profile: empty)
    with pytest.raises(ConfigError, match=message):
        prepare(load_experiment("quickstart-clean"), small, 0)


def test_unknown_task_and_device_are_named(small):
    experiment = load_experiment("quickstart-clean")
    with pytest.raises(ConfigError, match=r"task\.name must be one of arithmetic"):
        prepare(experiment, small.model_copy(update={"task": small.task.model_copy(update={"name": "maths"})}), 0)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' is not there"):
            prepare(experiment, small.model_copy(update={"device": "cuda"}), 0)
