"""Whole runs with equal hardware in both phases and without noise: a correction leaves them as they are.

Rollouts and training then differ by rounding alone, since the sampler sums in another order than a training pass: by
less than `ROUNDING` nats a token. The bounds of every rejection and of the bands below are so narrow that more than
rounding would be cut.

To the bit: rejections, which either change a mask or nothing. (That needs the KL penalty of these runs. Without one,
the update makes no pass over rollouts without advantage unless a rejection needs them, and sums take another order.)

To rounding: weights, which are exp(d) instead of 1, and bypass mode, whose old log-probabilities differ by d. Over a
response of t tokens, both change losses and gradients by factors within exp(+-t d); `BOUND` is that for the longest.
(Rejections in bypass mode are left out: they cut what the batch's first optimizer step has learnt, too.)
What is drawn (tokens, rewards) and everything measured before the first update is equal to the bit all the same.
"""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from roundoff.config import REJECTIONS
from tests.training.test_corrected_update import BYPASS, experiment, settings, start
from tests.training.test_loop import reproducible, run, with_training

ROUNDING = 1e-5
BOUND = 24 * ROUNDING
NARROW = [0.999, 1.001]
HARDWARE = {
    "plain": (),
    "mxfp4": ("hardware.precision.weight='mxfp4'", "hardware.precision.activation='mxfp4'"),
}
EVERY_REJECTION = settings(
    rollout_rs=list(REJECTIONS), rollout_rs_threshold=[NARROW if name[-1] == "1" else 1e-6 for name in REJECTIONS]
)
TO_ROUNDING = {
    "token": settings(rollout_is="'token'", rollout_is_threshold=2.0),
    "icepop": settings(rollout_is="'token'", rollout_is_threshold=NARROW),
    "sequence": settings(rollout_is="'sequence'", rollout_is_threshold=2.0),
    "token, normalized": settings(rollout_is="'token'", rollout_is_batch_normalize="true"),
    "sequence, normalized": settings(rollout_is="'sequence'", rollout_is_batch_normalize="true"),
    "bypass": BYPASS,
}
DRAWN = ("reward", "accuracy", "mixed_groups", "response_tokens", "truncated", "empty", "trained", "learning_rate")
OF_CORRECTIONS = {
    "rollout_is_mean": 1.0,
    "rollout_is_eff_sample_size": 1.0,
    "rollout_is_batch_norm_factor": 1.0,
    "rollout_is_ratio_fraction_high": 0.0,
    "rollout_is_ratio_fraction_low": 0.0,
    "rollout_rs_masked_fraction": 0.0,
    "rollout_rs_seq_masked_fraction": 0.0,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, small):
    """What a run left, by hardware and correction: its rows, and its weights after the last step."""
    profile = with_training(small, checkpoint_every=2)

    @cache
    def finished(hardware, correction=()):
        found = run(tmp_path_factory.mktemp("run"), experiment(*HARDWARE[hardware], *correction), profile)
        (file,) = found.path.glob("checkpoints/step-000002/model.safetensors")
        return reproducible(found.path)[1:], load_file(file)

    return finished


def without_correction(row):
    return {name: value for name, value in row.items() if name not in OF_CORRECTIONS}


def numbers(entry):
    return [x for x in entry if x is not None] if isinstance(entry, list) else entry


@pytest.mark.parametrize("hardware", HARDWARE)
def test_rejections_leave_a_run_as_it_is_to_the_bit(made, hardware):
    plain, weights = made(hardware)
    assert len(plain) == 2 and all(row["trained"] and 0 < row["mismatch_max"] < ROUNDING for row in plain)
    rows, found = made(hardware, EVERY_REJECTION)
    assert [without_correction(row) for row in rows] == plain
    assert all(torch.equal(value, found[name]) for name, value in weights.items())
    assert all(row["rollout_rs_masked_fraction"] == row["rollout_rs_seq_masked_fraction"] == 0 for row in rows)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("correction", TO_ROUNDING)
def test_weights_and_bypass_mode_leave_a_run_as_it_is_to_rounding(made, small, hardware, correction):
    plain, weights = made(hardware)
    rows, found = made(hardware, TO_ROUNDING[correction])
    for row, expected in zip(rows, plain, strict=True):
        assert [row[name] for name in DRAWN] == [expected[name] for name in DRAWN]
        compared = set(expected)
        if correction == "bypass":  # the first minibatch alone is measured
            compared = {name for name in expected if not name.startswith("mismatch_")}
        assert compared >= {"loss", "kl", "entropy", "grad_norm", "ratio_mean", "ratio_std", "ratio_ess"}
        for name in compared:
            assert numbers(row[name]) == pytest.approx(numbers(expected[name]), rel=BOUND, abs=BOUND), name
        for name in row.keys() & OF_CORRECTIONS.keys():
            assert row[name] == pytest.approx(OF_CORRECTIONS[name], abs=BOUND if OF_CORRECTIONS[name] else 0), name
    if correction != "bypass":
        of_first = {name: value for name, value in plain[0].items() if name.startswith("mismatch_")}
        assert of_first and {name: rows[0][name] for name in of_first} == of_first
    before = start(small)
    moved = sum(float((value - before[name]).abs().sum()) for name, value in weights.items())
    # Adam divides by the size of gradients, so that a step changes by as much as they do; where a gradient is rounding
    # alone its sign may change, in too few elements to matter in the sum.
    assert sum(float((found[name] - value).abs().sum()) for name, value in weights.items()) < BOUND * moved
    assert moved > 0
