"""The difference between rollouts and a training pass: formulas by hand, long responses, and the row of a step."""

import math

import numpy as np
import pytest
import torch

from roundoff.experiments import load_experiment
from roundoff.parallel.ranks import ALONE
from roundoff.training.loop import sample_batch
from roundoff.training.mismatch import Difference, by_length, length_classes, measures, mismatch_row
from roundoff.training.preparation import prepare
from roundoff.training.update import update
from tests.thread_ranks import on_ranks
from tests.training.test_loop import with_algorithm, with_training

ROLLOUT = [[-0.5, -1.0, -2.0], [-0.25, -3.0, math.nan], [math.nan] * 3]
DIFFERENCE = [[0.3, -0.2, 0.9], [-0.4, 0.1, 5.0], [7.0] * 3]
MASK = [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
TOKENS = [0.3, -0.2, 0.9, -0.4, 0.1]


def difference_of(rollout, difference, mask):
    sampled = torch.tensor(rollout, dtype=torch.float64)
    return Difference.of([(sampled, sampled + torch.tensor(difference, dtype=torch.float64), torch.tensor(mask))])


def plain(found):
    return {name: float(value[0]) for name, value in found.items()}


def test_every_measure_is_its_formula_written_out():
    found = plain(measures(difference_of(ROLLOUT, DIFFERENCE, MASK), cap=1.3))
    rho = [math.exp(d) for d in TOKENS]
    s, mean, rollout = [1.0, -0.3], [1.0 / 3, -0.15], [-3.5 / 3, -3.25 / 2]
    w = [math.exp(x) for x in s]
    expected = {
        "mean": 1.9 / 5,
        "p99": 0.9,
        "max": 0.9,
        "kl": -0.7 / 5,
        "k3_kl": sum(r - 1 - d for r, d in zip(rho, TOKENS, strict=True)) / 5,
        "kl_reverse": sum(r * d for r, d in zip(rho, TOKENS, strict=True)) / 5,
        "k3_kl_reverse": sum(r * d - r + 1 for r, d in zip(rho, TOKENS, strict=True)) / 5,
        "training_ppl": sum(math.exp(-a - b) for a, b in zip(rollout, mean, strict=True)) / 2,
        "rollout_ppl": sum(math.exp(-a) for a in rollout) / 2,
        "ppl_ratio": sum(math.exp(-a) for a in mean) / 2,
        "chi2_token": sum(r * r for r in rho) / 5 - 1,
        "chi2_seq": sum(x * x for x in w) / 2 - 1,
        "ess_token": sum(rho) ** 2 / (5 * sum(r * r for r in rho)),
        "ess_seq": sum(w) ** 2 / (2 * sum(x * x for x in w)),
        "cut_token": 2 / 5,  # exp(0.3) = 1.35 and exp(0.9)
        "cut_seq": 1 / 2,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_measures_of_a_resample_are_those_of_the_responses_repeated():
    generator = np.random.default_rng(0)
    mask = np.arange(9) < generator.integers(1, 10, 30)[:, None]
    rollout, d = -generator.exponential(size=(30, 9)), generator.normal(0, 0.3, (30, 9))
    counts = generator.multinomial(30, np.full(30, 1 / 30), size=4).astype(float)
    found = measures(difference_of(rollout, d, mask), 2.0, counts)
    for i, row in enumerate(counts.astype(int)):
        again = np.repeat(np.arange(30), row)
        expected = plain(measures(difference_of(rollout[again], d[again], mask[again]), 2.0))
        assert {name: float(value[i]) for name, value in found.items()} == pytest.approx(expected, rel=1e-9)


def test_long_responses_overflow_nothing_and_a_small_difference_does_not_cancel():
    # log weights -900 and -901: exp is 0 for both, though their ratio is e
    found = plain(
        measures(difference_of([[-1.0] * 3000] * 2, [[-0.3] * 3000, [-0.3] * 2999 + [-1.3]], [[1] * 3000] * 2), 2)
    )
    w = [1.0, math.exp(-1)]
    assert found["ess_seq"] == pytest.approx(sum(w) ** 2 / (2 * (1 + w[1] ** 2)), rel=1e-9)
    assert found["chi2_seq"] == pytest.approx(math.exp(-40) - 1)  # clamped as in verl
    tiny = plain(measures(difference_of([[-1.0] * 4], [[1e-9, -1e-9, 1e-9, -1e-9]], [[1] * 4]), 2.0))
    assert tiny["k3_kl"] == pytest.approx(5e-19, rel=0.01)
    lost = plain(measures(difference_of([[-1.0, -1.0]], [[-math.inf, 0.0]], [[1, 1]]), 2.0))
    assert (lost["kl"], lost["max"], lost["ess_token"]) == (math.inf, math.inf, pytest.approx(0.5))


def test_classes_of_length_double():
    assert length_classes(np.array([1, 2, 3, 4, 7, 8, 1023, 1024])).tolist() == [0, 1, 1, 2, 2, 3, 9, 10]
    first, second = by_length(difference_of(ROLLOUT, DIFFERENCE, MASK), 2.0)
    assert first is None and second["max"] == pytest.approx(0.9)
    only = by_length(difference_of(ROLLOUT, DIFFERENCE, [[1, 0, 0], [1, 1, 0], [0, 0, 0]]), 2.0)
    assert [c["max"] for c in only] == pytest.approx([0.3, 0.4])


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="at least one response token"):
        difference_of(ROLLOUT, DIFFERENCE, [[0] * 3] * 3)
    with pytest.raises(ValueError, match="must be of one shape"):
        Difference.of([(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3))])


def row_of(session):
    session.optimizer.param_groups[0]["lr"] = 1e-4
    metrics = update(session, 1, sample_batch(session, 1))
    return {name: value for name, value in metrics.items() if name.startswith("mismatch")}


def test_equal_hardware_differs_by_rounding_and_other_hardware_by_more(small):
    rows = {name: row_of(prepare(load_experiment(f"quickstart-{name}"), small, 0)) for name in ("clean", "noise")}
    clean, noise = rows["clean"], rows["noise"]
    assert 0 < clean["mismatch_max"] < 1e-4 and abs(clean["mismatch_kl"]) < 1e-5
    assert clean["mismatch_ess_seq"] == pytest.approx(1, abs=1e-6) and clean["mismatch_cut_seq"] == 0
    assert noise["mismatch_mean"] > 0.01 and noise["mismatch_ess_seq"] < 0.99
    assert 0 < noise["mismatch_k3_kl"] < 1 and noise["mismatch_k3_kl_lengths"][-1] > 0


@pytest.mark.parametrize(("ratio", "minibatches"), [("replayed", 2), ("recomputed", 2), ("one", 1)])
def test_the_first_pass_over_each_minibatch_is_what_is_measured(small, monkeypatch, ratio, minibatches):
    seen = []
    monkeypatch.setattr("roundoff.training.update.mismatch_row", lambda ranks, parts, cap: seen.extend(parts) or {})
    experiment = with_algorithm(load_experiment("quickstart-clean"), ratio=ratio, kl_coefficient=0.0)
    session = prepare(experiment, with_training(small, minibatches=minibatches), 0)
    row_of(session)
    assert len(seen) == minibatches
    for rollouts, logprobs in seen:  # that of the weights before the update, also for the second
        mask = rollouts.response_mask
        torch.testing.assert_close(logprobs[mask], rollouts.logprobs[mask], atol=1e-4, rtol=0)
    assert mismatch_row(ALONE, seen, 2.0)["mismatch_max"] < 1e-4


def test_the_row_of_two_ranks_is_that_of_one(small):
    experiment = load_experiment("quickstart-clean")
    alone = row_of(prepare(experiment, small, 0))
    both = on_ranks(2, lambda ranks: row_of(prepare(experiment, small, 0, ranks=ranks)))
    assert both[0] == both[1] and both[0].keys() == alone.keys()
    for name in ("mismatch_training_ppl", "mismatch_rollout_ppl", "mismatch_ess_seq", "mismatch_mean"):
        assert both[0][name] == pytest.approx(alone[name], rel=0.2 if name == "mismatch_mean" else 1e-5)
