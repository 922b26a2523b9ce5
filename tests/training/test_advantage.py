import pytest
import torch

from roundoff.config import Algorithm
from roundoff.training.advantage import group_advantages, mixed_groups, overlong_penalty

GRPO = Algorithm(name="GRPO")
CENTRED = Algorithm(name="GRPO", normalize_std=False)


def test_a_worked_group_is_centred_and_divided_by_the_unbiased_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    # Group 0: mean 1/4, squares 9/16 + 3/16 = 12/16, over G - 1 = 3: 1/4, deviation 1/2.
    # Group 1: mean 1/2, squares 4/4 = 1, over 3, deviation 1/sqrt(3) = 0.57735.
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.8660254, 0.8660254, -0.8660254, -0.8660254]])
    # The deviation has 1e-6 added: relative 2e-6, hence 5e-6 on numbers up to 1.5.
    torch.testing.assert_close(group_advantages(rewards, GRPO), expected, atol=5e-6, rtol=0)
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(group_advantages(rewards, CENTRED), centred)


@pytest.mark.parametrize("algorithm", [GRPO, CENTRED])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_of_equal_rewards_gives_exactly_zero(algorithm, value):
    rewards = torch.full((3, 7), value)
    rewards[1, 0] += 1.0  # a mixed group beside them changes nothing
    advantages = group_advantages(rewards, algorithm)
    assert torch.equal(advantages[[0, 2]], torch.zeros(2, 7))
    assert advantages[1].abs().min() > 0
    assert mixed_groups(rewards).tolist() == [False, True, False]


def test_whole_number_rewards_are_accepted():
    assert torch.equal(group_advantages(torch.tensor([[2, 0]]), CENTRED), torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [mixed_groups, lambda r: group_advantages(r, GRPO)])
def test_a_reward_that_is_not_finite_is_named(function, bad):
    rewards = torch.zeros(2, 4)
    rewards[1, 3] = bad
    with pytest.raises(ValueError, match=r"rollout 3 of prompt 1 has (nan|inf)"):
        function(rewards)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_a_group_of_one_is_refused(unchecked_shapes, shape):
    with pytest.raises(ValueError, match="at least 2 rollouts in a group"):
        group_advantages(torch.zeros(shape), GRPO)


def test_overlong_penalty_is_the_published_line():
    dapo = Algorithm(name="DAPO", overlong_buffer=0.25, overlong_factor=0.5)
    # 1,024 tokens, buffer 256: nothing up to 768, half of the factor at 896, the factor at 1,024 and beyond.
    lengths = torch.tensor([1, 768, 769, 896, 1024, 1100])
    expected = torch.tensor([0.0, 0.0, -0.5 / 256, -0.25, -0.5, -0.5])
    assert torch.equal(overlong_penalty(lengths, 1024, dapo), expected)


def test_no_overlong_buffer_gives_no_penalty():
    assert torch.equal(overlong_penalty(torch.tensor([5, 10]), 10, GRPO), torch.zeros(2))
