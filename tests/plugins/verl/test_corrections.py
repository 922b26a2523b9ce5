"""Weights, rejections, metrics and losses are those of verl's own functions on random batches (`make test-verl`)."""

import importlib

import pytest
import torch

from roundoff.config import REJECTIONS, Algorithm, RolloutCorrection
from roundoff.training.correction import correct, corrected
from roundoff.training.loss import loss_normalizer, policy_loss

pytest.importorskip("verl")
pytestmark = pytest.mark.verl

helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
algos = importlib.import_module("verl.trainer.ppo.core_algos")
ActorConfig = importlib.import_module("verl.workers.config").ActorConfig
AGGREGATIONS = {
    "token-mean": "token-mean",
    "sequence-mean": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
BOUND = {"k1": "0.7_1.4", "k2": "0.15", "k3": "0.15"}


def batch(seed, spread=0.5):
    """Old and rollout log-probabilities [8, 12], 0 outside the mask, of responses of 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 12, *torch.randint(1, 13, (6,), generator=generator).tolist()])
    mask = torch.arange(12)[None, :] < lengths[:, None]
    old = -3 * torch.rand(8, 12, generator=generator)
    rollout = old + spread * torch.randn(8, 12, generator=generator)
    return torch.where(mask, old, 0.0), torch.where(mask, rollout, 0.0), mask


def compared(correction, **verl):
    for seed in range(20):
        old, rollout, mask = batch(seed)
        (found,), left, metrics = correct([corrected(old, rollout, mask, correction)], correction, lambda own: [own])
        weights, kept, theirs = helper.compute_rollout_correction_and_rejection_mask(
            old_log_prob=old, rollout_log_prob=rollout, response_mask=mask.float(), **verl
        )
        assert torch.equal(found.kept, kept.bool()) and left == [int(kept.sum())]
        assert (found.weights is None) == (weights is None)
        if weights is not None:
            # verl divides by the number of tokens plus 1e-8, and sums in float32.
            torch.testing.assert_close(found.weights, weights.batch["rollout_is_weights"], rtol=2e-6, atol=0)
        for name, value in metrics.items():
            assert value == pytest.approx(theirs[f"rollout_corr/{name}"], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("level", "threshold"),
    # A band that cuts every weight of a batch makes verl divide by zero.
    [("token", 1.3), ("token", "0.5_5.0"), ("token", "0.8_1.25"), ("sequence", 2.0), ("sequence", "0.3_5.0")],
)
def test_weights_are_those_of_verl(level, threshold, normalize):
    verl = {"rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": normalize}
    compared(RolloutCorrection(**verl), **verl)


@pytest.mark.parametrize("name", [*REJECTIONS, "token_k1,seq_mean_k3", "seq_max_k2,token_k3"])
def test_rejections_are_those_of_verl(name):
    verl = {"rollout_rs": name, "rollout_rs_threshold": ",".join(BOUND[one[-2:]] for one in name.split(","))}
    compared(RolloutCorrection(**verl), **verl)
    if "k1" in name and "," not in name:
        verl = {"rollout_rs": name, "rollout_rs_threshold": 1.4}
        compared(RolloutCorrection(**verl), **verl)


def test_weights_and_rejections_together_are_those_of_verl():
    verl = {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True}
    verl |= {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.9_1.1"}
    compared(RolloutCorrection(**verl), **verl)


def actor(algorithm, mask, **policy_loss):
    """verl's settings of the actor for one minibatch, and what it tells its loss about it."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=8,
        ppo_micro_batch_size_per_gpu=8,
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        clip_ratio_c=1e9 if algorithm.dual_clip is None else algorithm.dual_clip,
    )
    of_batch = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask)}
    object.__setattr__(config, "global_batch_info", of_batch)
    if policy_loss:
        object.__setattr__(config, "policy_loss", policy_loss)
    return config


LOSSES = {
    "vanilla": {},
    "vanilla with dual clip": {"dual_clip": 1.5},
    "cispo": {"loss": "cispo"},
    "gspo": {"loss": "gspo", "gspo_clip_low": 0.05, "gspo_clip_high": 0.08, "clip_low": 0.05, "clip_high": 0.08},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_gradients_are_those_of_verl(case, aggregation, weighted):
    chosen = {"aggregation": aggregation, "kl_coefficient": 0.0, "ratio": "recomputed", **LOSSES[case]}
    rejects = {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.15, "rollout_is": "token"}
    algorithm = Algorithm(name="GRPO", **chosen, **({"correction": rejects} if weighted else {}))
    for seed in range(10):
        old, rollout, mask = batch(seed)
        advantages = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        weights, used = None, mask
        if weighted:
            found = corrected(old, rollout, mask, algorithm.correction)
            weights, used = found.weights, found.kept
        changed = old + 0.4 * torch.randn(8, 12, generator=torch.Generator().manual_seed(100 + seed))
        ours, theirs = changed.clone().requires_grad_(), changed.clone().requires_grad_()
        normalizer = loss_normalizer(mask, algorithm, 12) if aggregation != "token-mean" else used.sum().float()
        output = policy_loss(ours, old, None, advantages, used, algorithm, normalizer=normalizer, weights=weights)
        function = algos.get_policy_loss_fn(case.split()[0])
        expected, _ = function(
            old_log_prob=old,
            log_prob=theirs,
            advantages=advantages[:, None].expand(8, 12),
            response_mask=used.float(),
            loss_agg_mode=AGGREGATIONS[aggregation],
            config=actor(algorithm, used),
            rollout_is_weights=weights,
        )
        output.loss.backward()
        expected.backward()
        # Float32: sums of up to 96 terms of order 1 over their number.
        torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "verl",
    [
        {"loss_type": "ppo_clip"},
        {"loss_type": "ppo_clip", "rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.1},
        {"loss_type": "reinforce"},
        {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": "0.5_2.0"},
        {
            "loss_type": "reinforce",
            "rollout_is": "sequence",
            "rollout_rs": "token_k1",
            "rollout_rs_threshold": "0.5_2.0",
        },
    ],
    ids=str,
)
def test_bypass_mode_is_that_of_verl(verl, aggregation):
    algorithm = Algorithm(
        name="GRPO",
        kl_coefficient=0.0,
        ratio="recomputed",
        aggregation=aggregation,
        correction={"bypass_mode": True, **verl},
    )
    for seed in range(10):
        new, rollout, mask = batch(seed)
        advantages = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
        found = corrected(ours, rollout, mask, algorithm.correction)
        output = policy_loss(
            ours,
            rollout,
            None,
            advantages,
            found.kept,
            algorithm,
            normalizer=loss_normalizer(mask, algorithm, 12),
            weights=found.weights,
        )
        expected, _ = algos.get_policy_loss_fn("bypass_mode")(
            old_log_prob=rollout,
            log_prob=theirs,
            advantages=advantages[:, None].expand(8, 12),
            response_mask=mask.float(),
            loss_agg_mode=AGGREGATIONS[aggregation],
            config=actor(algorithm, mask, rollout_correction=verl),
        )
        output.loss.backward()
        expected.backward()
        torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
