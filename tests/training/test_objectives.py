"""The losses beside the clipped one: values and gradients written out by hand, response by response."""

import math

import pytest
import torch

from roundoff.config import Algorithm
from roundoff.training.loss import LossOutput, combine, policy_loss

LENGTHS = (6, 1, 4, 3)
# Float32: sums of 14 terms of order 1, relative to the largest.
CLOSE = {"rtol": 0, "atol": 3e-6}


def batch(seed=0, spread=0.4):
    """New (differentiable) and old log-probabilities [4, 6], advantages of both signs, the mask and weights."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6)[None, :] < torch.tensor(LENGTHS)[:, None]
    old = -2 * torch.rand(4, 6, generator=generator)
    new = old + spread * torch.randn(4, 6, generator=generator)
    weights = torch.rand(4, 6, generator=generator) * 2
    new = torch.where(mask, new, math.nan).requires_grad_()
    return new, torch.where(mask, old, math.nan), torch.tensor([1.5, -0.7, -1.2, 0.8]), mask, weights


def expected(values, algorithm, weighted):
    """Loss [] and gradient [4, 6], from the equations, with numbers of double precision."""
    new, old, advantages, _, weights = values
    tokens, rollouts = sum(LENGTHS), len(LENGTHS)
    loss, gradient = 0.0, torch.zeros(4, 6)
    for i, length in enumerate(LENGTHS):
        A = float(advantages[i])
        logs = [float(new.detach()[i, t]) for t in range(length)]
        ratios = [math.exp(logs[t] - float(old[i, t])) for t in range(length)]
        whole = math.exp(sum(map(math.log, ratios)) / length)
        for t in range(length):
            share = (1 / tokens) if algorithm.aggregation == "token-mean" else 1 / length / rollouts
            share *= float(weights[i, t]) if weighted else 1.0
            value, slope = of_token(algorithm, A, logs[t], ratios[t], whole)
            loss += share * value
            gradient[i, t] += share * slope
    return loss, gradient


def of_token(algorithm, advantage, log, ratio, whole):
    """Loss of a token and its derivative with respect to its log-probability."""
    A, kind = advantage, algorithm.loss_in_force
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    if kind == "reinforce":
        return -A * log, -A
    if kind == "cispo":
        weight = min(max(ratio, low), high)
        return -weight * A * log, -weight * A
    if kind == "gspo":
        ratio, low, high = whole, 1 - algorithm.gspo_clip_low, 1 + algorithm.gspo_clip_high
    if A < 0 and algorithm.dual_clip is not None and ratio > algorithm.dual_clip:
        return -algorithm.dual_clip * A, 0.0
    if (A > 0 and ratio > high) or (A < 0 and ratio < low):
        return -A * min(max(ratio, low), high), 0.0
    return -A * ratio, -A * ratio


CASES = {
    "gspo": {"loss": "gspo", "gspo_clip_low": 0.1, "gspo_clip_high": 0.05},
    "gspo as published": {"loss": "gspo"},
    "cispo": {"loss": "cispo", "clip_low": 0.3, "clip_high": 0.2},
    "reinforce": {"loss": "reinforce"},
    "dual clip": {"dual_clip": 1.3},
    "clip": {},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("case", CASES)
def test_each_loss_and_its_gradient_are_those_of_its_equation(case, aggregation, weighted):
    settings = {"ratio": "recomputed", "aggregation": aggregation, **CASES[case]}
    if weighted:
        settings["correction"] = {"rollout_is": "token"}
    algorithm = Algorithm(name="GRPO", **settings, kl_coefficient=0.0)
    for seed in range(5):
        values = batch(seed)
        new, old, advantages, mask, weights = values
        output = policy_loss(new, old, None, advantages, mask, algorithm, weights=weights if weighted else None)
        output.loss.backward()
        loss, gradient = expected(values, algorithm, weighted)
        torch.testing.assert_close(output.loss.detach(), torch.tensor(loss, dtype=torch.float32), **CLOSE)
        torch.testing.assert_close(torch.where(mask, new.grad, 0.0), gradient, **CLOSE)


def test_the_gradient_of_gspo_is_that_of_the_ratio_of_the_response():
    """GSPO-token under `sequence-mean` is GSPO: equation 5 differentiated by autograd, nothing detached."""
    algorithm = Algorithm(name="GRPO", loss="gspo", aggregation="sequence-mean", gspo_clip_low=0.1, gspo_clip_high=0.1)
    for seed in range(5):
        new, old, advantages, mask, _ = batch(seed, spread=0.2)
        policy_loss(
            new, old, None, advantages, mask, algorithm.model_copy(update={"kl_coefficient": 0.0})
        ).loss.backward()
        again = torch.where(mask, new.detach(), 0.0).requires_grad_()
        s = ((again - torch.where(mask, old, 0.0)).sum(1) / mask.sum(1)).exp()
        (-torch.min(s * advantages, s.clamp(0.9, 1.1) * advantages).mean()).backward()
        torch.testing.assert_close(torch.where(mask, new.grad, 0.0), torch.where(mask, again.grad, 0.0), **CLOSE)


@pytest.mark.parametrize("case", ["gspo", "cispo", "dual clip"])
def test_shares_of_tokens_that_a_clip_changes(case):
    algorithm = Algorithm(name="GRPO", kl_coefficient=0.0, **CASES[case])
    new, old, advantages, mask, _ = values = batch(1)
    output = policy_loss(new, old, None, advantages, mask, algorithm)
    _, gradient = expected(values, algorithm, False)
    cut = output.clip_low_fraction + output.clip_high_fraction
    if case == "cispo":  # no gradient is cut; the weights are
        ratio = torch.where(mask, (new - old).exp(), 1.0)
        assert float(cut) == pytest.approx(float(((ratio < 0.7) | (ratio > 1.2)).sum() / mask.sum()))
        assert (gradient[mask] != 0).all()
    else:
        assert 0 < float(cut) == pytest.approx(float((gradient[mask] == 0).float().mean()))


def test_losses_agree_where_old_and_new_policy_are_the_same():
    """At a ratio of 1 every loss has the gradient of REINFORCE, to the bit (the table of docs/algorithms.md)."""
    gradients = []
    for case in CASES:
        new, _, advantages, mask, _ = batch()
        algorithm = Algorithm(name="GRPO", kl_coefficient=0.0, **CASES[case])
        policy_loss(new, new.detach(), None, advantages, mask, algorithm).loss.backward()
        gradients.append(torch.where(mask, new.grad, 0.0))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_the_importance_ratio_of_reinforce_is_its_weight():
    algorithm = Algorithm(
        name="GRPO", ratio="recomputed", kl_coefficient=0.0, loss="reinforce", correction={"rollout_is": "token"}
    )
    new, old, advantages, mask, weights = batch()
    output = policy_loss(new, old, None, advantages, mask, algorithm, weights=weights)
    assert float(output.ratio_mean) == pytest.approx(float(weights[mask].mean()))
    assert float(output.ratio_std) == pytest.approx(float(weights[mask].std(correction=0)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("micro", [4, 3, 1])
def test_the_importance_ratio_of_gspo_is_that_of_responses(micro, weighted):
    """Each response counts once, however long it is; one whose tokens are all left out does not count."""
    settings = {"ratio": "recomputed", "correction": {"rollout_is": "token"}} if weighted else {}
    algorithm = Algorithm(name="GRPO", kl_coefficient=0.0, loss="gspo", **settings)
    new, old, advantages, mask, weights = batch()
    mask[3] = False
    parts = [
        policy_loss(
            *(new[rows], old[rows], None, advantages[rows], mask[rows], algorithm),
            weights=weights[rows] if weighted else None,
        )
        for rows in torch.arange(4).split(micro)
    ]
    found = combine([*parts, LossOutput.nothing()])
    whole = [float((new.detach() - old)[i, :length].double().mean().exp()) for i, length in enumerate(LENGTHS[:3])]
    if weighted:
        whole = [s * float(weights[i, : LENGTHS[i]].double().mean()) for i, s in enumerate(whole)]
    mean = sum(whole) / 3
    squares = sum(s * s for s in whole) / 3
    assert float(found.ratio_mean) == pytest.approx(mean, rel=1e-6)
    assert float(found.ratio_std) == pytest.approx(math.sqrt(squares - mean**2), rel=1e-6)
    assert float(found.ratio_ess) == pytest.approx(mean**2 / squares, rel=1e-6)
    assert (int(found.ratios), int(found.tokens)) == (3, 11)
