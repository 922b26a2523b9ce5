"""Statistics and ranks on numbers worked out by hand."""

import math

import pytest
import torch

from roundoff.formats.table import FORMATS
from roundoff.models.calibration import text_kl
from roundoff.numerics.rng import Key
from roundoff.srdd.damage import decibel, input_errors, saturated, sink_tokens
from roundoff.srdd.exact import divergence
from roundoff.srdd.gradient import drawn_labels, token_scores
from roundoff.srdd.layer_scan import rank_correlation


def block(*values):
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def test_the_worked_block():
    # Scale 1 (formats.table): 0.30 -> 0.5, -1 -> -1, 2.5 -> 2 (tie to even), 7 -> 6 (beyond the largest), 0.1 -> 0.
    found = input_errors(block(0.30, -1.0, 2.5, 7.0, 0.1), "mxfp4")
    assert found.energy.item() == pytest.approx(
        (0.2**2 + 0.5**2 + 1.0 + 0.1**2) / (0.3**2 + 1.0 + 2.5**2 + 49.0 + 0.1**2), rel=1e-6
    )
    assert (found.nonzero.item(), found.dead.item(), found.saturated.item()) == (5, 1, 1)


def test_a_token_of_zeros_has_no_error():
    found = input_errors(torch.zeros(1, 32), "mxfp4")
    assert (found.energy.item(), found.nonzero.item(), found.dead.item(), found.saturated.item()) == (0, 0, 0, 0)


def test_saturation_by_format():
    # MXFP4 with the rule ceil takes scale 2 for 7 (largest number 12); floor takes 1 (largest 6).
    assert saturated(block(7.0, -6.5, 5.0), "mxfp4").sum() == 2
    assert saturated(block(7.0, -6.5, 5.0), "mxfp4:ceil").sum() == 0
    assert saturated(torch.tensor([[70000.0, 60000.0]]), "fp16").tolist() == [[True, False]]
    assert saturated(torch.tensor([[70000.0, 60000.0]]), "bf16").sum() == 0
    # HiF8 becomes infinite from 1.25 * 2^15; HiF4's largest scale is 1.5 * 2^15, and its largest element 7 times that.
    assert saturated(torch.tensor([[41000.0, 40000.0]]), "hif8").tolist() == [[True, False]]
    assert saturated(torch.tensor([[7.1 * 49152.0, 6.9 * 49152.0]]), "hif4").tolist() == [[True, False]]


@pytest.mark.parametrize("name", sorted(name for name, fmt in FORMATS.items() if fmt.rows == 1))
def test_what_saturates_is_made_smaller_in_every_format(name):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    from roundoff.numerics.quantize import quantize

    over = saturated(x, name)
    q = quantize(x, name, tensor_scale="row")
    assert over.shape == x.shape
    assert bool((q[over].abs() < x[over].abs()).all())


def test_sink_tokens_by_input_or_output():
    h = torch.ones(10, 4)
    big = h.clone()
    big[0] *= 11.0  # energy 121 times the median
    near = h.clone()
    near[0] *= 9.0  # 81 times
    expected = [True] + [False] * 9
    assert sink_tokens(h, big).tolist() == sink_tokens(big, h).tolist() == expected
    assert not sink_tokens(near, h).any()


def test_decibel():
    assert decibel(0.01) == pytest.approx(20.0)
    assert decibel(0.0) == math.inf
    assert decibel(None) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),
        # A tie at rank 1.5: covariance 1.5 against variances 2 and 1.5: 1.5 / sqrt(3)
        ([1, 2, 3], [1, 1, 2], 1.5 / 3**0.5),
        ([1, 2, 3], [5, 5, 5], None),
        ([1], [1], None),
        ([1, 2], [1, float("nan")], None),
    ],
)
def test_rank_correlation(first, second, expected):
    assert rank_correlation(first, second) == (None if expected is None else pytest.approx(expected))


def test_divergence_and_its_standard_error_over_texts():
    # Texts of 10 and 30 tokens with KL sums 1 and 7: 8 / 40 = 0.2; residuals 1 - 2 = -1 and 7 - 6 = 1;
    # sqrt(2 / 1 * (1 + 1)) / 40 = 0.05.
    found = divergence([1.0, 7.0], [10, 30])
    assert found.kl == pytest.approx(0.2)
    assert found.se == pytest.approx(0.05)
    assert divergence([1.0], [10]).se is None


def test_kl_of_two_coins():
    # p = (1/2, 1/2), q = (1/4, 3/4): log 2 - (log 1 + log 3) / 2 + ... = 0.5 log(1/2 / 1/4) + 0.5 log(1/2 / 3/4)
    p = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    q = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]]).log()
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    assert text_kl(p, q, torch.tensor([[True, True]])) == pytest.approx([2 * expected], rel=1e-6)
    assert text_kl(p, q, torch.tensor([[True, False]])) == pytest.approx([expected], rel=1e-6)


def test_token_scores():
    g = torch.tensor([[[1.0, 2.0], [1.0, 1.0], [9.0, 9.0]]])
    e = torch.tensor([[[3.0, 4.0], [1.0, -1.0], [9.0, 9.0]]])
    assert token_scores(g, e, torch.tensor([[True, True, False]])).tolist() == [121.0, 0.0]


def test_drawn_labels_follow_the_distribution_and_the_key():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(20_000, 3)
    rows = torch.arange(20_000)
    labels = drawn_labels(logits, Key.from_seed(0), rows)
    share = torch.bincount(labels, minlength=3) / 20_000
    # 4.5 standard errors of a share of 1/2
    assert torch.allclose(share, torch.tensor([0.2, 0.5, 0.3]), atol=4.5 * (0.25 / 20_000) ** 0.5)
    assert torch.equal(labels[100:200], drawn_labels(logits[100:200], Key.from_seed(0), rows[100:200]))
    assert not torch.equal(labels, drawn_labels(logits, Key.from_seed(1), rows))
