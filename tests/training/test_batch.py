"""Batches: what is drawn, what a bad rollout does to its group, and what is counted."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from roundoff.config import Experiment, validate
from roundoff.experiments import load_experiment
from roundoff.training.loop import sample_batch
from roundoff.training.preparation import prepare
from tests.training.test_loop import SameReward

training = importlib.import_module("roundoff.training.loop")  # `roundoff.training.loop` is the function


def test_oversampling_draws_more_prompts_at_a_time_and_trains_on_one_batch(small):
    settings = {**small.task.settings, "train_problems": 64}
    wide = small.model_copy(update={"task": small.task.model_copy(update={"settings": settings})})
    dapo = load_experiment("E8a")
    session = prepare(dapo, wide, 0)
    assert session.total_steps == 64 // (8 * 2)
    batch = sample_batch(session, 1)
    assert batch.prompts % 16 == 0
    assert len(batch.advantages) <= 8 * dapo.algorithm.group_size
    assert (batch.advantages.view(-1, dapo.algorithm.group_size) != 0).any(1).all()  # groups of equal reward are out


def test_aqn_leaves_the_weights_as_they_were(small):
    session = prepare(load_experiment("quickstart-noise-aqn"), small, 0)
    session.aqn = replace(session.aqn, curve=(0.05, 0.05))
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    noisy = sample_batch(session, 1)
    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters())
    session.aqn = replace(session.aqn, curve=(0.0, 0.0))
    assert sample_batch(session, 1).rollouts.texts != noisy.rollouts.texts


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


def rollouts_of(small, monkeypatch, *, rewards: list[float], nonfinite: list[int]):
    """The batch of a step whose rollouts earn these rewards, over and over, and of which some were not computed."""
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    real = training.sample

    def spoilt(*arguments, **options):
        found = real(*arguments, **options)
        found.nonfinite[nonfinite] = True
        return found

    monkeypatch.setattr(training, "sample", spoilt)
    earned = iter(rewards * 100)
    session.task = SameReward(session.task, 0.0)
    monkeypatch.setattr(session.task, "reward", lambda problem, response: next(earned))
    return sample_batch(session, 1)


def test_a_rollout_that_was_not_computed_is_no_part_of_its_group(small, monkeypatch):
    # group 0: only the two that were not computed earn nothing, so that the others are equal and teach nothing
    batch = rollouts_of(small, monkeypatch, rewards=[1.0] * 8, nonfinite=[0, 3])
    assert batch.advantages[:8].tolist() == [0.0] * 8
    assert (batch.mixed_groups, batch.teaches, batch.nonfinite, batch.sampled) == (0.0, False, 2, 64)
    assert batch.accuracy == pytest.approx(62 / 64)  # what was not computed earns nothing, whatever its text


def test_the_advantages_of_the_others_are_those_of_the_smaller_group(small, monkeypatch):
    # 1, 0, 0, 0 without the four others: mean 0.25, standard deviation sqrt((0.75**2 + 3 * 0.25**2) / 3) = 0.5
    batch = rollouts_of(small, monkeypatch, rewards=[1, 0, 0, 0, 1, 1, 1, 1], nonfinite=[4, 5, 6, 7])
    expected = [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]
    assert batch.advantages[:8].tolist() == pytest.approx(expected, abs=1e-5)  # 1e-6 is added to the deviation


def test_a_group_with_one_computed_rollout_teaches_nothing(small, monkeypatch):
    batch = rollouts_of(small, monkeypatch, rewards=[1, 0, 0, 0, 0, 0, 0, 0], nonfinite=list(range(1, 8)))
    assert batch.advantages[:8].tolist() == [0.0] * 8
    assert not batch.advantages.isnan().any()


def test_rollouts_without_a_text_are_counted(small, monkeypatch):
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    real = training.sample

    def silent(*arguments, **options):
        found = real(*arguments, **options)
        found.texts[:16] = [" "] * 16
        found.truncated[:] = False
        return found

    monkeypatch.setattr(training, "sample", silent)
    assert sample_batch(session, 1).empty == 0.25
