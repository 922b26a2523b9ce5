import math

import pytest
import torch

from roundoff.config import Algorithm
from roundoff.training.loss import LossOutput, combine, kl_estimate, loss_normalizer, policy_loss, truncated_weights

PLAIN = Algorithm(name="GRPO", kl_coefficient=0.0)
DAPO = Algorithm(name="DAPO")
LOG = {r: math.log(r) for r in (0.5, 1.1, 1.25, 1.5)}
# Float32 holds seven digits and each number here is the result of fewer than 20 operations on numbers near 1.
TIGHT = {"atol": 2e-6, "rtol": 0}


def batch():
    """Two rollouts; ratios 1.5, 1.1 and 0.5, 1.25, 1.5; the last token of the first is padding."""
    old = torch.tensor([[-1.0, -2.0, float("nan")], [-0.5, -1.5, -3.0]])
    new = old + torch.tensor([[LOG[1.5], LOG[1.1], 0.0], [LOG[0.5], LOG[1.25], LOG[1.5]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return new.requires_grad_(), old, torch.tensor([2.0, -1.0]), mask


def test_token_mean_with_the_symmetric_clip_by_hand():
    new, old, advantages, mask = batch()
    # A = 2:  min(1.5*2, 1.2*2) = 2.4 and 1.1*2 = 2.2.
    # A = -1: min(-0.5, -0.8) = -0.8 (clipped below), -1.25 and -1.5 (a large ratio is not clipped under A < 0).
    # Loss: -(2.4 + 2.2 - 0.8 - 1.25 - 1.5)/5 = -1.05/5 = -0.21.
    output = policy_loss(new, old, None, advantages, mask, PLAIN)
    torch.testing.assert_close(output.loss, torch.tensor(-0.21), **TIGHT)
    output.loss.backward()
    # d(ratio)/d(new) = ratio: 0 where clipped, else -ratio*A/5: 1.1*2/5 = 0.44, 1.25/5 = 0.25, 1.5/5 = 0.3.
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -0.44, 0.0], [0.0, 0.25, 0.3]]), **TIGHT)
    assert (output.clip_high_fraction.item(), output.clip_low_fraction.item()) == pytest.approx((0.2, 0.2))


def test_dapo_raises_the_upper_clip_alone():
    new, old, advantages, mask = batch()
    # As above with 1.28*2 = 2.56 for the first token: -(2.56 + 2.2 - 3.55)/5 = -1.21/5.
    torch.testing.assert_close(policy_loss(new, old, None, advantages, mask, DAPO).loss, torch.tensor(-0.242), **TIGHT)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", -1.05 / 5),
        # Mean over rollouts of the mean over tokens: ((-2.4 - 2.2)/2 + (0.8 + 1.25 + 1.5)/3)/2.
        ("sequence-mean", (-2.3 + 3.55 / 3) / 2),
        # Sum over tokens, over 2 rollouts times the constant length 3: -1.05/6.
        ("dr_grpo", -1.05 / 6),
    ],
)
def test_each_aggregation_is_its_formula_by_hand(aggregation, expected):
    new, old, advantages, mask = batch()
    algorithm = PLAIN.model_copy(update={"aggregation": aggregation})
    output = policy_loss(new, old, None, advantages, mask, algorithm)
    torch.testing.assert_close(output.loss, torch.tensor(expected), **TIGHT)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "dr_grpo"])
def test_micro_batches_add_up_to_the_minibatch(aggregation):
    new, old, advantages, mask = batch()
    reference = old - 0.3
    algorithm = Algorithm(name="GRPO", aggregation=aggregation, kl_coefficient=0.1)
    whole = policy_loss(new, old, reference, advantages, mask, algorithm)
    (gradient,) = torch.autograd.grad(whole.loss, new)
    normalizer = loss_normalizer(mask, algorithm, 3)
    parts = [
        policy_loss(new[[i]], old[[i]], reference[[i]], advantages[[i]], mask[[i]], algorithm, normalizer=normalizer)
        for i in range(2)
    ]
    (gradient_of_parts,) = torch.autograd.grad(parts[0].loss + parts[1].loss, new)
    torch.testing.assert_close(gradient_of_parts, gradient, **TIGHT)
    assert combine(parts).metrics() == pytest.approx(whole.metrics(), abs=2e-6)
    assert combine([*parts, LossOutput.nothing()]).metrics() == pytest.approx(whole.metrics(), abs=2e-6)
    # A mean of means differs: this test would pass without a normalizer if the rollouts had equal lengths.
    if aggregation == "token-mean":
        alone = [policy_loss(new[[i]], old[[i]], reference[[i]], advantages[[i]], mask[[i]], algorithm) for i in (0, 1)]
        assert abs((alone[0].loss + alone[1].loss).item() / 2 - whole.loss.item()) > 0.01


def test_the_ratio_and_its_gradient_at_the_first_update():
    # Equal new and old: ratio exactly 1 (bitwise), nothing clipped, gradient -A/tokens.
    logprobs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.ones(4, 6, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    output = policy_loss(logprobs, logprobs.detach().clone(), None, advantages, mask, PLAIN)
    metrics = output.metrics()
    assert (metrics["ratio_mean"], metrics["ratio_std"], metrics["ratio_ess"]) == (1.0, 0.0, 1.0)
    output.loss.backward()
    torch.testing.assert_close(logprobs.grad, (-advantages / 24)[:, None].expand(4, 6), **TIGHT)
    # `one` needs no old log-probabilities, ignores any, and gives the same gradient.
    one = PLAIN.model_copy(update={"ratio": "one"})
    for old in (None, logprobs.detach() + 3.0):
        again = logprobs.detach().clone().requires_grad_()
        output = policy_loss(again, old, None, advantages, mask, one)
        output.loss.backward()
        assert torch.equal(again.grad, logprobs.grad)
        assert output.metrics()["ratio_std"] == 0.0


def test_mean_spread_and_effective_size_of_the_ratio_by_hand():
    new, old, advantages, mask = batch()
    metrics = policy_loss(new, old, None, advantages, mask, PLAIN).metrics()
    # Ratios 1.5, 1.1, 0.5, 1.25, 1.5: sum 5.85, squares 2.25 + 1.21 + 0.25 + 1.5625 + 2.25 = 7.5225.
    assert metrics["ratio_mean"] == pytest.approx(1.17, abs=2e-6)
    assert metrics["ratio_std"] == pytest.approx(math.sqrt(7.5225 / 5 - 1.17**2), abs=2e-6)
    assert metrics["ratio_ess"] == pytest.approx(5.85**2 / (5 * 7.5225), abs=2e-6)
    assert metrics["tokens"] == 5


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = ref - new = ln 0.5: k1 = ln 2, k2 = (ln 2)^2/2, k3 = 0.5 + ln 2 - 1.
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("low_var_kl", math.log(2) - 0.5),
    ],
)
def test_each_kl_estimator_and_its_gradient_by_hand(estimator, expected):
    algorithm = Algorithm(name="GRPO", kl_coefficient=0.5, kl_estimator=estimator)
    new, old, _, mask = batch()
    output = policy_loss(new, old, new.detach() - math.log(2), torch.zeros(2), mask, algorithm)
    torch.testing.assert_close(output.kl, torch.tensor(expected), **TIGHT)
    torch.testing.assert_close(output.loss, torch.tensor(0.5 * expected), **TIGHT)
    output.loss.backward()
    # d(k)/d(new) with d = ln 0.5: k1: 1; k2: -d = ln 2; k3: 1 - exp(d) = 0.5. Times 0.5 over 5 tokens.
    slope = {"k1": 1.0, "k2": math.log(2), "low_var_kl": 0.5}[estimator]
    torch.testing.assert_close(new.grad, 0.1 * slope * mask, **TIGHT)


def test_low_var_kl_of_a_token_that_only_the_reference_knows_stays_finite():
    new = torch.tensor([-60.0], requires_grad=True)
    estimate = kl_estimate(new, torch.tensor([-0.1]), Algorithm(name="GRPO"))
    assert estimate.item() == 10.0
    estimate.backward()
    assert new.grad.item() == 0.0


@pytest.mark.parametrize(
    ("aggregation", "mean"),
    [("token-mean", (0.5 + 1.0 + 0.2 + 0.3 + 0.4) / 5), ("sequence-mean", (1.5 / 2 + 0.9 / 3) / 2)],
)
def test_the_entropy_bonus_lowers_the_loss_and_is_aggregated_like_it(aggregation, mean):
    new, old, advantages, mask = batch()
    entropies = torch.tensor([[0.5, 1.0, math.nan], [0.2, 0.3, 0.4]], requires_grad=True)
    plain = PLAIN.model_copy(update={"aggregation": aggregation})
    without = policy_loss(new, old, None, advantages, mask, plain, entropies=entropies)
    output = policy_loss(
        *(new, old, None, advantages, mask),
        plain.model_copy(update={"entropy_coefficient": 0.1}),
        entropies=entropies,
    )
    torch.testing.assert_close(without.loss - output.loss, torch.tensor(0.1 * mean), **TIGHT)
    output.loss.backward()
    share = torch.tensor([[0.1, 0.1, 0.0], [0.1, 0.1, 0.1]]) / 5
    if aggregation == "sequence-mean":
        share = torch.tensor([[0.1 / 2, 0.1 / 2, 0.0], [0.1 / 3, 0.1 / 3, 0.1 / 3]]) / 2
    torch.testing.assert_close(entropies.grad, -share, **TIGHT)


def test_truncated_weights_scale_the_policy_term_alone():
    rollout = Algorithm(name="GRPO", ratio="rollout", kl_coefficient=0.1, tis_cap=2.0)
    old = torch.tensor([[-1.0, -1.0, -1.0, float("nan")]])
    sampler = torch.tensor([[-1.0 - math.log(5), -1.0, -1.0 + math.log(4), float("nan")]])
    mask = torch.tensor([[True, True, True, False]])
    # exp(old - rollout) = 5, 1, 1/4: the first is cut to 2.
    weights = truncated_weights(old, sampler, mask, rollout)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0, 0.25, 0.0]]), **TIGHT)
    new = torch.full((1, 4), -1.0, requires_grad=True)
    output = policy_loss(new, old, new.detach(), torch.tensor([1.0]), mask, rollout, weights=weights)
    output.loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-2.0, -1.0, -0.25, 0.0]]) / 3, **TIGHT)
    # Weights 2, 1, 1/4: (3.25)^2 / (3 * 5.0625).
    assert output.metrics()["ratio_ess"] == pytest.approx(3.25**2 / (3 * 5.0625), abs=2e-6)


def test_what_stands_outside_the_mask_has_no_influence():
    new, old, advantages, mask = batch()
    new = torch.where(mask, new.detach(), float("inf")).requires_grad_()
    output = policy_loss(new, old, old, advantages, mask, Algorithm(name="GRPO"))
    output.loss.backward()
    assert new.grad.isfinite().all()
    assert new.grad[0, 2] == 0
    assert all(math.isfinite(value) for value in output.metrics().values())


def test_an_empty_mask_gives_a_loss_of_zero():
    new, old, advantages, mask = batch()
    output = policy_loss(new, old, None, advantages, torch.zeros_like(mask), PLAIN)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert not new.grad.any()


def test_a_column_of_advantages_is_the_same_as_a_row():
    new, old, advantages, mask = batch()
    row, column = (policy_loss(new, old, None, a, mask, PLAIN).loss for a in (advantages, advantages[:, None]))
    assert torch.equal(row, column)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs": None}, "old_logprobs must be given with algorithm.ratio = 'replayed'"),
        ({"algorithm": Algorithm(name="GRPO")}, "ref_logprobs must be given"),
        ({"advantages": torch.zeros(3)}, r"advantages must be \[2\]"),
        ({"mask": torch.ones(2, 4)}, "mask must have the shape of logprobs"),
        (
            {"weights": torch.ones(2, 3)},
            "weights must be given with algorithm.ratio = 'rollout' or correction.rollout_is",
        ),
        ({"algorithm": PLAIN.model_copy(update={"ratio": "rollout"})}, "weights must be given"),
        ({"logprobs": torch.zeros(3)}, "logprobs must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(unchecked_shapes, change, message):
    new, old, advantages, mask = batch()
    arguments = {
        "logprobs": new,
        "old_logprobs": old,
        "ref_logprobs": None,
        "advantages": advantages,
        "mask": mask,
        "algorithm": PLAIN,
    }
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments | change)


@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("micro", [40, 7, 1])
def test_a_small_spread_of_the_ratio_is_measured(spread, micro):
    """Of the ratios as float64 has them; a hundredth is the rounding of log-probabilities and means at 1e-6."""
    difference = spread * torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    old, mask = torch.zeros(40, 20), torch.ones(40, 20, dtype=torch.bool)
    mask[:, 15:] = False
    parts = [
        policy_loss(difference[r], old[r], None, torch.ones(len(r)), mask[r], PLAIN)
        for r in torch.arange(40).split(micro)
    ]
    expected = float(difference[mask].double().exp().std(correction=0))
    assert float(combine(parts).ratio_std) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("d", [1e-8, -1e-6, 1e-5, -1e-4, 1e-3, 0.1, -3.0])
def test_k3_of_a_small_difference_is_half_its_square(d):
    """d^2/2 + d^3/6 + ... to the last bits, where float32 has 0 or a negative number for exp(d) - d - 1."""
    value = kl_estimate(torch.zeros(1), torch.full((1,), d), Algorithm(name="GRPO"))
    exact = float(torch.full((1,), d).double())
    assert value.item() == pytest.approx(math.expm1(exact) - exact if abs(d) > 1e-3 else exact**2 / 2, rel=1e-3)
    assert value.item() > 0


def test_the_gradient_of_k3_is_that_of_its_formula_in_float32():
    torch.manual_seed(0)
    new, reference = torch.randn(64).mul(1e-3).requires_grad_(), torch.randn(64)
    kl_estimate(new, reference, Algorithm(name="GRPO")).sum().backward()
    plain = new.detach().clone().requires_grad_()
    d = (reference - plain).clamp(-20, 20)
    (d.exp() - d - 1.0).clamp(max=10).sum().backward()
    assert torch.equal(new.grad, plain.grad)
