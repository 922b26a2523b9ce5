"""The update on the embedded model: which log-probabilities meet, and what a minibatch leaves out."""

import pytest
import torch

from roundoff.config import Profile
from roundoff.experiments import load_experiment
from roundoff.sampling.diagnosis import nonfinite_parameters
from roundoff.training.loop import sample_batch
from roundoff.training.preparation import prepare
from roundoff.training.update import (
    Minibatch,
    NonFiniteLossError,
    before_update,
    keyed_logprobs,
    minibatch_loss,
    split_into_minibatches,
    update,
)
from tests.training.test_loop import with_algorithm, with_training


@pytest.fixture
def noisy(small):
    """A session on noisy hardware and the minibatches of its first step."""
    session = prepare(load_experiment("quickstart-noise"), small, 0)
    return session, split_into_minibatches(session, sample_batch(session, 1))


def test_replayed_log_probabilities_are_the_same_bits(noisy):
    session, parts = noisy
    key = session.key.fold("update", 1)
    for part in (minibatch.rollouts for minibatch in parts):
        with torch.no_grad():
            old, _ = keyed_logprobs(session, session.model, part, key)
        new, _ = keyed_logprobs(session, session.model, part, key)  # with gradients: another path through every layer
        assert torch.equal(old, new.detach())


def test_the_shortcut_for_the_first_minibatch_changes_nothing(noisy):
    session, parts = noisy
    assert before_update(session, 1, parts[0], first=True).old is None
    explicit = before_update(session, 1, parts[0], first=False).old
    new, _ = keyed_logprobs(session, session.model, parts[0].rollouts, session.key.fold("update", 1))
    assert torch.equal(explicit, new.detach())


def test_recomputed_log_probabilities_meet_another_draw(noisy):
    session, parts = noisy
    session.experiment = with_algorithm(session.experiment, ratio="recomputed")
    old = before_update(session, 1, parts[0], first=True).old
    new, _ = keyed_logprobs(session, session.model, parts[0].rollouts, session.key.fold("update", 1))
    mask = parts[0].rollouts.response_mask
    assert ((old - new.detach()).abs()[mask] > 1e-3).float().mean() > 0.5


def test_micro_batches_do_not_change_the_update(small):
    # on clean hardware: each product of the backward pass draws noise of its own
    whole, parts = (clean_update(small, micro_batch) for micro_batch in (0, 12))
    for name, value in whole.items():
        # sums of about 100 float32 products in another order: a few ulp of the largest term
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-5 * float(value.abs().max()))


def clean_update(profile: Profile, micro_batch: int) -> dict[str, torch.Tensor]:
    session = prepare(load_experiment("quickstart-clean"), with_training(profile, micro_batch=micro_batch), 0)
    parts = split_into_minibatches(session, sample_batch(session, 1))
    minibatch_loss(session, 1, before_update(session, 1, parts[0], first=True))
    return {n: p.grad.clone() for n, p in session.model.named_parameters()}


def gradients(session, minibatch):
    minibatch_loss(session, 1, before_update(session, 1, minibatch, first=True))
    session.optimizer.collect()
    found = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    for parameter in session.model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("kl", [0.0, 0.001])
def test_rollouts_without_advantage_are_passed_over_only_where_they_have_no_gradient(small, kl):
    experiment = with_algorithm(load_experiment("quickstart-clean"), kl_coefficient=kl)
    session = prepare(experiment, with_training(small, minibatches=1), 0)
    batch = sample_batch(session, 1)
    count, useful = len(batch.advantages), int((batch.advantages != 0).sum())
    assert 0 < useful < count
    (minibatch,) = split_into_minibatches(session, batch)
    assert len(minibatch.rollouts) == (count if kl else useful)
    assert minibatch.normalizer == batch.rollouts.response_mask.sum()  # all count
    expected = gradients(session, Minibatch(batch.rollouts, batch.advantages, minibatch.normalizer))
    for name, gradient in gradients(session, minibatch).items():
        # Sums of some hundred float32 terms in another order, relative to the largest element.
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * size)


def test_a_minibatch_in_which_nothing_teaches_moves_the_optimizer_on(small):
    session = prepare(with_algorithm(load_experiment("quickstart-clean"), kl_coefficient=0.0), small, 0)
    batch = sample_batch(session, 1)
    half = len(batch.advantages) // 2
    batch.advantages[:half], batch.advantages[half:] = 0.0, 1.0
    parts = split_into_minibatches(session, batch)
    assert [int((part.advantages != 0).sum() > 0) for part in parts] == [0, 1]
    assert len(parts[0].rollouts) == session.algorithm.group_size


def step_of(session):
    session.optimizer.param_groups[0]["lr"] = 1e-4
    return update(session, 1, sample_batch(session, 1))


def test_a_weight_that_the_optimizer_step_makes_nan_stops_the_run(small, monkeypatch):
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    step = session.optimizer.step

    def poisoned(*arguments):
        step(*arguments)
        with torch.no_grad():
            session.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan

    monkeypatch.setattr(session.optimizer, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"weights hold NaN or Inf \(model.layers.1.mlp.up_proj.weight"):
        step_of(session)


def test_a_gradient_that_is_not_finite_moves_no_weight_and_names_its_parameter(small, monkeypatch):
    session = prepare(load_experiment("quickstart-clean"), small, 0)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    collect = session.optimizer.collect

    def poisoned():
        collect()
        session.model.model.norm.weight.grad[0] = torch.inf

    monkeypatch.setattr(session.optimizer, "collect", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"gradients of 1 weights are not \(model.norm.weight\)"):
        step_of(session)
    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters())


def test_a_reference_model_that_is_nan_is_blamed(small):
    session = prepare(with_algorithm(load_experiment("quickstart-clean"), kl_coefficient=0.1), small, 0)
    with torch.no_grad():
        session.reference.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="KL to the reference model is not finite"):
        step_of(session)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_parameters_that_are_not_finite_are_named(value):
    parameters = {name: torch.nn.Parameter(torch.ones(3, 3)) for name in "abc"}
    parameters["large"] = torch.nn.Parameter(torch.full((4,), 3e38))  # its sum overflows, and it is finite
    assert nonfinite_parameters(parameters) == []
    with torch.no_grad():
        parameters["b"][1, 2] = value
    assert nonfinite_parameters(parameters) == ["b"]
