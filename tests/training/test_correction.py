"""Weights, rejections and what they report, against sums written out by hand, number by number."""

import math

import pytest
import torch

from roundoff.config import REJECTIONS, RolloutCorrection
from roundoff.training.correction import correct, corrected, named

SPREAD = 0.6
LENGTHS = (7, 1, 3, 5, 2, 7)


def batch(seed=0, spread=SPREAD):
    """Old and rollout log-probabilities [6, 7] and the mask; NaN outside of it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
    old = -3 * torch.rand(6, 7, generator=generator)
    rollout = old + spread * torch.randn(6, 7, generator=generator)
    return torch.where(mask, old, math.nan), torch.where(mask, rollout, math.nan), mask


def by_hand(values):
    """Lists of log-ratios, one for each response, in double precision."""
    old, rollout, mask = values
    return [
        [float(o) - float(r) for o, r, m in zip(*row, strict=True) if m] for row in zip(old, rollout, mask, strict=True)
    ]


def padded(rows):
    found = torch.zeros(len(rows), 7)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return found


def bounded(r, lower, upper):
    if lower is None:
        return min(r, upper)
    return r if lower <= r <= upper else 0.0


@pytest.mark.parametrize("threshold", [1.3, (0.6, 1.5)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_those_written_out_by_hand(level, threshold):
    correction = RolloutCorrection(rollout_is=level, rollout_is_threshold=threshold)
    lower, upper = correction.bounds
    values = batch()
    raw = [
        [math.exp(d) for d in row] if level == "token" else [math.exp(sum(row))] * len(row) for row in by_hand(values)
    ]
    expected = [[bounded(r, lower, upper) for r in row] for row in raw]
    found = corrected(*values, correction)
    # Float32 exponentials of sums of up to seven terms: a few ulp.
    torch.testing.assert_close(found.weights, padded(expected), rtol=2e-6, atol=0)
    assert torch.equal(found.kept, values[2])
    flat = [w for row in expected for w in row]
    assert any(w != r for row, of in zip(expected, raw, strict=True) for w, r in zip(row, of, strict=True))
    metrics = correct([found], correction, lambda own: [own])[2]
    each = [r for row in raw for r in (row if level == "token" else row[:1])]
    assert metrics == pytest.approx(
        {
            "rollout_is_mean": sum(flat) / len(flat),
            "rollout_is_eff_sample_size": sum(flat) ** 2 / len(flat) / sum(w * w for w in flat),
            "rollout_is_ratio_fraction_high": sum(r > upper for r in each) / len(each),
            "rollout_is_ratio_fraction_low": sum(r < (lower or 1 / upper) for r in each) / len(each),
        },
        rel=1e-6,
    )


K = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - 1 - d}
MIDDLE = {"k1": (0.7, 1.4), "k2": 0.15, "k3": 0.15}


@pytest.mark.parametrize("name", REJECTIONS)
def test_rejections_are_those_written_out_by_hand(name):
    level, _, kind = name.rpartition("_")
    threshold = MIDDLE[kind]
    if level == "seq_sum" and kind != "k1":
        threshold *= 3
    values = batch()
    expected = []
    for row in by_hand(values):
        k = [K[kind](d) for d in row]
        of = {"token": k, "seq_sum": [sum(k)], "seq_mean": [sum(k) / len(k)], "seq_max": [max(k)]}[level]
        passed = [math.log(threshold[0]) <= v <= math.log(threshold[1]) if kind == "k1" else v <= threshold for v in of]
        expected.append(passed if level == "token" else passed * len(row))
    correction = RolloutCorrection(rollout_rs=name, rollout_rs_threshold=(threshold,))
    found = corrected(*values, correction)
    assert torch.equal(found.kept, padded(expected).bool())
    assert found.weights is None
    assert found.kept.any() and not found.kept[values[2]].all()
    flat = [kept for row in expected for kept in row]
    assert correct([found], correction, lambda own: [own])[2] == pytest.approx(
        {
            "rollout_rs_masked_fraction": 1 - sum(flat) / len(flat),
            "rollout_rs_seq_masked_fraction": sum(not all(row) for row in expected) / len(expected),
        }
    )


def test_several_rejections_must_all_be_passed_and_one_threshold_serves_all():
    values = batch()
    single = [
        corrected(*values, RolloutCorrection(rollout_rs=name, rollout_rs_threshold=threshold)).kept
        for name, threshold in (("token_k2", 0.15), ("seq_mean_k3", 0.15))
    ]
    both = corrected(*values, RolloutCorrection(rollout_rs="token_k2,seq_mean_k3", rollout_rs_threshold=0.15)).kept
    assert torch.equal(both, single[0] & single[1])
    assert not torch.equal(both, single[0]) and not torch.equal(both, single[1])


def test_bounds_of_k1_are_those_of_rollout_over_training():
    """As in verl: k1 is -log r, so [0.5, 1.2] keeps training/rollout between 1/1.2 and 2."""
    rollout = torch.zeros(1, 4)
    old = torch.tensor([[0.45, 1.95, 0.8, 1.1]]).log()
    kept = corrected(
        old,
        rollout,
        torch.ones(1, 4),
        RolloutCorrection(rollout_rs="token_k1", rollout_rs_threshold="0.5_1.2"),
    ).kept
    assert kept.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalized_weights_have_mean_one_over_minibatches_and_ranks(level):
    correction = RolloutCorrection(rollout_is=level, rollout_is_batch_normalize=True)
    parts = [corrected(*batch(seed), correction) for seed in (0, 1)]
    other = [corrected(*batch(seed), correction) for seed in (2, 3)]
    theirs = [part.sums.tolist() for part in other]
    found, left, metrics = correct(parts, correction, lambda own: [own, theirs])
    factor = metrics["rollout_is_batch_norm_factor"]
    for before, after in zip(parts, found, strict=True):
        torch.testing.assert_close(after.weights * factor, before.weights, rtol=1e-6, atol=0)
    mask = batch()[2]
    weights = [part.weights for part in (*parts, *other)]
    counted = torch.cat([w[mask] if level == "token" else w[:, 0] for w in weights])
    assert factor == pytest.approx(float(counted.mean()), rel=1e-6)
    assert left == [2 * sum(LENGTHS)] * 2


def test_weights_that_were_all_cut_are_not_divided_by_zero():
    old, rollout, mask = batch(spread=0.0)
    correction = RolloutCorrection(rollout_is="token", rollout_is_threshold=(0.9, 1.1), rollout_is_batch_normalize=True)
    found, _, metrics = correct([corrected(old + 1, rollout, mask, correction)], correction, lambda own: [own])
    assert not found[0].weights.any()
    assert metrics["rollout_is_batch_norm_factor"] == 1.0 and metrics["rollout_is_eff_sample_size"] == 0.0


ALL = [
    *({"rollout_is": level} for level in ("token", "sequence")),
    *({"rollout_is": level, "rollout_is_threshold": (0.5, 5.0)} for level in ("token", "sequence")),
    *({"rollout_is": level, "rollout_is_batch_normalize": True} for level in ("token", "sequence")),
    *({"rollout_rs": name, "rollout_rs_threshold": 1.001 if name.endswith("k1") else 0.001} for name in REJECTIONS),
]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_equal_log_probabilities_are_corrected_by_nothing(settings):
    """To the bit: every weight is 1.0 and every token is kept."""
    old, _, mask = batch()
    correction = RolloutCorrection(**settings)
    (found,), left, _ = correct([corrected(old, old, mask, correction)], correction, lambda own: [own])
    assert torch.equal(found.kept, mask) and left == [sum(LENGTHS)]
    assert found.weights is None or torch.equal(found.weights, mask.float())


def test_a_difference_beyond_the_limit_gives_finite_numbers():
    mask = torch.ones(1, 2)
    old, rollout = torch.tensor([[100.0, -100.0]]), torch.zeros(1, 2)
    for settings in ({"rollout_is": "token", "rollout_is_threshold": 1e30}, *ALL):
        found = corrected(old, rollout, mask, RolloutCorrection(**settings))
        assert found.sums.isfinite().all()
        assert found.weights is None or found.weights.isfinite().all()
    assert named(found.sums.tolist())["rejected"] == 2
