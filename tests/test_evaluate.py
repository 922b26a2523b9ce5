"""The scorer: pass@k by hand, samples deployed and clean, no noise of a remedy in a score."""

from itertools import combinations

import pytest

from roundoff.aqn import aqn_noise
from roundoff.config import AQN
from roundoff.evaluate import evaluate, evaluate_samples, pass_at_k
from roundoff.experiments import load_experiment
from roundoff.numerics.rng import Key
from roundoff.session import load_policy, make_task


@pytest.mark.parametrize(
    ("samples", "solved", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs hold the solved one
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (5, 2, 4, 1.0),  # only 3 are unsolved
        (5, 0, 5, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(samples, solved, k, expected):
    assert pass_at_k(samples, solved, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_solved_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("samples", "solved", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_outside_its_range(samples, solved, k):
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        pass_at_k(samples, solved, k)


def sampled(policy, small, **options):
    return evaluate_samples(
        policy.model,
        policy.loaded.tokenizer,
        make_task(small),
        key=Key.from_seed(0),
        max_new_tokens=24,
        **{"samples": 4, "temperature": 1.0, **options},
    )


def test_samples_differ_from_each_other_and_under_noise_from_clean_ones(small):
    outcomes = sampled(load_policy(load_experiment("quickstart-noise"), small, 0), small)
    assert len(outcomes) == 32
    assert all(len(o.deployed) == len(o.clean) == 4 for o in outcomes)
    assert any(0 < sum(o.clean) < 4 for o in outcomes)
    assert any(o.deployed != o.clean for o in outcomes)
    assert [o.id for o in outcomes] == [p.id for p in make_task(small).test()]


def test_samples_of_a_plain_model_are_one_and_the_same(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    assert all(o.deployed == o.clean for o in sampled(policy, small))


def test_at_a_temperature_near_zero_samples_are_the_greedy_answer(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    greedy = evaluate(
        policy.model, policy.loaded.tokenizer, make_task(small), key=Key.from_seed(0), max_new_tokens=24
    ).outcomes
    cold = sampled(policy, small, temperature=1e-4)
    assert [o.deployed for o in cold] == [(g.clean,) * 4 for g in greedy]


def test_a_score_under_aqn_is_refused(small):
    policy = load_policy(load_experiment("quickstart-clean"), small, 0)
    aqn = AQN(sigma_start=0.05, sigma_end=0.05, schedule="constant")
    with aqn_noise(policy.model, 0.05, None, Key(1), aqn):
        with pytest.raises(RuntimeError, match="noise of a remedy"):
            sampled(policy, small)
        with pytest.raises(RuntimeError, match="noise of a remedy"):
            evaluate(policy.model, policy.loaded.tokenizer, make_task(small), key=Key(0), max_new_tokens=4)
