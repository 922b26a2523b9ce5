"""Corrections in training: they change nothing where rollouts and training agree, and what they leave out is left."""

import importlib
from dataclasses import replace

import pytest
import torch

from roundoff.config import REJECTIONS
from roundoff.experiments import load_experiment, load_profile
from roundoff.experiments.registry import with_overrides
from roundoff.parallel.ranks import ALONE
from roundoff.training.loop import sample_batch
from roundoff.training.loss import policy_loss
from roundoff.training.preparation import prepare
from roundoff.training.update import (
    before_update,
    corrected_batch,
    keyed_logprobs,
    minibatch_loss,
    split_into_minibatches,
    update,
)
from tests.thread_ranks import on_ranks
from tests.training.test_loop import run, with_algorithm, with_training

module = importlib.import_module("roundoff.training.update")

NOISE = "hardware.rollout.matmul_noise.relative_std=0.1"
NO_KL = "algorithm.kl_coefficient=0.0"


def settings(**correction):
    return tuple(f"algorithm.correction.{name}={value}" for name, value in correction.items())


REJECTED = [settings(rollout_rs=f"'{name}'", rollout_rs_threshold=2 if name[-1] == "1" else 1) for name in REJECTIONS]
WEIGHED = [
    settings(rollout_is=f"'{level}'", **more)
    for level in ("token", "sequence")
    for more in ({}, {"rollout_is_threshold": [0.5, 5.0]}, {"rollout_is_batch_normalize": "true"})
]
BYPASS = settings(bypass_mode="true")
NOTHING = settings(rollout_rs="'seq_sum_k2'", rollout_rs_threshold=1e-30)


def experiment(*assignments):
    found, _ = with_overrides(
        [load_experiment("quickstart-clean")], load_profile("tiny"), ("algorithm.ratio='recomputed'", *assignments)
    )
    return found[0]


def trained(small, *assignments, ranks=ALONE):
    """The weights after the update of one step, and its row."""
    session = prepare(experiment(*assignments), small, 0, ranks=ranks)
    session.optimizer.param_groups[0]["lr"] = 1e-3
    row = update(session, 1, sample_batch(session, 1))
    return {name: p.detach().clone() for name, p in session.model.named_parameters()}, row


def start(small, *assignments):
    return {n: p.detach().clone() for n, p in prepare(experiment(*assignments), small, 0).model.named_parameters()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def updated(row):
    """A row of metrics without what describes the rollouts alone."""
    return {name: value for name, value in row.items() if not name.startswith("mismatch_")}


def agree(monkeypatch):
    """Rollouts whose log-probabilities are those of the training pass, bit for bit."""

    def agreeing(session, step, minibatch, *, first):
        plain = session.experiment
        session.experiment = with_algorithm(plain, correction=None)
        found = before_update(session, step, minibatch, first=first)
        session.experiment = plain
        return replace(found, rollouts=replace(found.rollouts, logprobs=found.old))

    monkeypatch.setattr(module, "before_update", agreeing)


@pytest.mark.parametrize("correction", [*REJECTED, *WEIGHED, BYPASS], ids=str)
def test_where_log_probabilities_are_the_same_bits_training_is_too(small, monkeypatch, correction):
    agree(monkeypatch)
    plain, without = trained(small)
    found, row = trained(small, *correction)
    assert same(found, plain)
    assert not same(found, start(small))
    assert {name: row[name] for name in updated(without)} == updated(without)
    assert row["mismatch_kl"] == pytest.approx(0.0, abs=1e-6)
    assert row.get("rollout_rs_masked_fraction", 0.0) == 0.0
    assert row.get("rollout_is_eff_sample_size", 1.0) == row.get("rollout_is_mean", 1.0) == 1.0


@pytest.mark.parametrize("correction", REJECTED, ids=str)
def test_on_equal_hardware_a_rejection_leaves_training_as_it_is_to_the_bit(small, correction):
    assert same(trained(small, *correction)[0], trained(small)[0])


@pytest.mark.parametrize("correction", [*WEIGHED, BYPASS], ids=str)
def test_on_equal_hardware_weights_leave_the_gradient_as_it_is_to_rounding(small, correction):
    """Sampler and training pass sum in another order, so that log-probabilities differ by a few ulp of float32."""
    expected, found = gradients(small), gradients(small, *correction)
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-5 * size)


def test_bypass_with_reinforce_has_the_gradient_of_the_clipped_ratio_at_a_ratio_of_one(small, monkeypatch):
    reinforce = (*BYPASS, "algorithm.correction.loss_type='reinforce'")
    expected = gradients(small)
    for more in ((), ("algorithm.correction.rollout_is='token'",)):
        for name, gradient in gradients(small, *reinforce, *more).items():
            size = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-5 * size)


def first_minibatch(small, *assignments):
    session = prepare(experiment(*assignments), small, 0)
    minibatches = split_into_minibatches(session, sample_batch(session, 1))
    before = [before_update(session, 1, m, first=i == 0) for i, m in enumerate(minibatches)]
    return session, corrected_batch(session, before)[0][0]


def gradients(small, *assignments):
    session, minibatch = first_minibatch(small, *assignments)
    minibatch_loss(session, 1, minibatch)
    return {n: p.grad.clone() for n, p in session.model.named_parameters()}


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "dr_grpo"])
@pytest.mark.parametrize("bypass", [False, True])
def test_rejected_tokens_leave_the_loss_and_the_normalizer_of_verl(small, aggregation, bypass):
    rejection = settings(rollout_rs="'token_k2'", rollout_rs_threshold=0.002)
    more = (NOISE, NO_KL, f"algorithm.aggregation='{aggregation}'")
    session, minibatch = first_minibatch(small, *more, *rejection, *(BYPASS if bypass else ()))
    rollouts, T = minibatch.rollouts, session.profile.training.max_new_tokens
    new, _ = keyed_logprobs(session, session.model, rollouts, session.key.fold("update", 1))
    old = rollouts.logprobs if bypass else minibatch.old
    mask = rollouts.response_mask
    kept = mask & (0.5 * ((new.detach() if bypass else old) - rollouts.logprobs).square() <= 0.002)
    assert 0.1 < kept.sum() / mask.sum() < 0.9
    whole = session.experiment.algorithm.group_size * session.profile.training.prompts_per_step // 2
    tokens = kept.sum() if not bypass else minibatch.normalizer  # that of all rollouts of the minibatch
    normalizer = {"token-mean": tokens, "sequence-mean": whole, "dr_grpo": whole * T}[aggregation]
    assert float(minibatch.normalizer) == float(normalizer)
    plain = session.algorithm.model_copy(update={"correction": None})
    expected = policy_loss(new, old, None, minibatch.advantages, kept, plain, normalizer=float(normalizer)).loss
    output, _, _ = minibatch_loss(session, 1, minibatch)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-5, atol=1e-7)
    assert int(output.tokens) == int(kept.sum())
    found = {n: p.grad.clone() for n, p in session.model.named_parameters()}
    session.optimizer.zero_grad(set_to_none=True)
    expected.backward()
    for name, p in session.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=0, atol=2e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize("bypass", [(), BYPASS])
def test_micro_batches_and_ranks_do_not_change_a_corrected_update(small, bypass):
    assignments = (NOISE, NO_KL, *settings(rollout_rs="'seq_mean_k3'", rollout_rs_threshold=0.02), *bypass)
    if not bypass:
        assignments += settings(rollout_is="'sequence'", rollout_is_batch_normalize="true")
    whole, row = trained(small, *assignments)
    assert 0 < row["rollout_rs_masked_fraction"] < 1 and row["mismatch_k3_kl"] > 0.01
    parts = trained(with_training(small, micro_batch=12), *assignments)
    shared = on_ranks(2, lambda ranks: trained(small, *assignments, ranks=ranks))
    for found, other in (parts, *shared):
        assert updated(other) == pytest.approx(updated(row), rel=2e-4, abs=1e-6)
        assert other["mismatch_k3_kl"] == pytest.approx(row["mismatch_k3_kl"], rel=2e-4)
        for name, value in found.items():
            # Adam's first steps have the size of the learning rate; where a gradient is rounding alone, so is its sign.
            assert (value - whole[name]).abs().float().mean() < 2e-5, name


@pytest.mark.parametrize("bypass", [(), BYPASS])
def test_a_rejection_that_leaves_nothing_trains_nothing_and_the_run_goes_on(tmp_path, small, bypass):
    chosen = (NOISE, *NOTHING, *bypass)
    weights, row = trained(small, *chosen)
    assert same(weights, start(small, *chosen))
    assert row == {"trained": False, "rollout_rs_masked_fraction": 1.0, "rollout_rs_seq_masked_fraction": 1.0}
    finished = run(tmp_path, experiment(*chosen), small)
    assert finished.is_final
    assert [row["trained"] for row in finished.metrics[1:]] == [False, False]
    assert finished.status.trained_steps == 0


def test_a_minibatch_of_which_nothing_is_left_takes_no_step(small, monkeypatch):
    def one_sided(session, step, minibatch, *, first):
        found = before_update(session, step, minibatch, first=first)
        shift = 0.0 if first else 5.0
        return replace(found, rollouts=replace(found.rollouts, logprobs=found.old + shift))

    monkeypatch.setattr(module, "before_update", one_sided)
    steps = []
    step_taken = module._optimizer_step
    monkeypatch.setattr(module, "_optimizer_step", lambda *a: steps.append(1) or step_taken(*a))
    _, row = trained(small, *settings(rollout_rs="'token_k1'", rollout_rs_threshold=2))
    assert len(steps) == 1 and 0 < row["rollout_rs_masked_fraction"] < 1 and "trained" not in row


def test_a_run_with_a_correction_goes_on_to_the_same_bits_and_logs_it(tmp_path, small):
    mine = experiment(NOISE, *WEIGHED[1], *settings(rollout_rs="'seq_max_k2'", rollout_rs_threshold=0.5))
    whole = run(tmp_path / "whole", mine, small)
    run(tmp_path / "parts", mine, small, stop_after=1)
    resumed = run(tmp_path / "parts", mine, small)
    assert resumed.experiment == mine
    assert resumed.evaluation(2) == whole.evaluation(2)
    assert whole.metrics[1]["rollout_is_ratio_fraction_low"] + whole.metrics[1]["rollout_is_ratio_fraction_high"] > 0


@pytest.mark.parametrize("loss", ["gspo", "cispo", "reinforce"])
def test_every_loss_trains(tmp_path, small, loss):
    finished = run(tmp_path, experiment(f"algorithm.loss='{loss}'"), small)
    assert finished.is_final and finished.metrics[1]["grad_norm"] > 0


def test_corrections_by_response_of_one_token_are_told_of(tmp_path, small):
    single = with_training(small, max_new_tokens=1)
    chosen = experiment(*WEIGHED[3], *settings(rollout_rs="'seq_mean_k2,token_k2'", rollout_rs_threshold=1))
    with pytest.warns(
        UserWarning, match=r"one token .* so that sequence, seq_mean_k2 of algorithm.correction is the same"
    ):
        run(tmp_path / "one", chosen, single)
    by_token = run(tmp_path / "token", experiment(*WEIGHED[0]), single)
    assert not any("one token" in line for line in by_token.status.warnings)


def test_the_preset_of_ratio_rollout_is_token_weights_to_the_bit(small):
    preset, row = trained(small, NOISE, "algorithm.ratio='rollout'", "algorithm.tis_cap=1.2")
    chosen = settings(rollout_is="'token'", rollout_is_threshold=1.2)
    found, other = trained(small, NOISE, *chosen)
    assert same(found, preset)
    assert updated(row) == {name: other[name] for name in updated(row)}
    assert row["mismatch_k3_kl"] == other["mismatch_k3_kl"] > 0


def test_icepop_is_a_rejection_of_tokens_where_the_divisor_is_constant(small):
    base = (NOISE, NO_KL, "algorithm.aggregation='dr_grpo'")
    icepop = gradients(small, *base, *settings(rollout_is="'token'", rollout_is_threshold=[0.8, 1.25]))
    rejection = settings(rollout_rs="'token_k1'", rollout_rs_threshold=1.25, rollout_is="'token'")
    for name, gradient in gradients(small, *base, *rejection).items():
        torch.testing.assert_close(gradient, icepop[name], rtol=0, atol=2e-5 * float(icepop[name].abs().max()))
