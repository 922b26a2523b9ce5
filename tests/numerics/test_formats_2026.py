"""HiF8, HiF4, and NVFP4 as Transformer Engine computes it: worked blocks, published accuracy, two dimensions."""

import math

import pytest
import torch

from roundoff.formats.table import FORMATS
from roundoff.numerics.hifloat import e6m2_scale
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

TWO_DIMENSIONAL = [name for name, fmt in FORMATS.items() if fmt.rows > 1]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1.0625, 1.125),  # three bits near 1: a tie between 1 and 1.125 goes away from zero
        (1.06, 1.0),
        (17.9, 16.0),  # two bits from 2^4 on: 16, 20, 24, ...
        (18.0, 20.0),
        (300.0, 256.0),  # one bit from 2^8 on: 256, 384, 512
        (320.0, 384.0),
        (2.0**-16 * 1.5, 2.0**-15),  # no bits below 2^-15: powers of two alone
        (2.0**-22 * 0.5, 2.0**-22),
        (2.0**-22 * 0.49999997, 0.0),
        (32768.0 * 1.2499, 32768.0),
        (32768.0 * 1.25, math.inf),
    ],
)
def test_hif8_by_hand(number, expected):
    x = torch.tensor([number, -number])
    assert quantize(x, "hif8").tolist() == [expected, -expected]


def test_hif8_has_as_many_numbers_as_codes():
    # 256 codes: both zeros are one number here, NaN takes one of the two codes of zero.
    x = torch.linspace(-40900, 40900, 200_001)
    small = torch.logspace(-8, 5, 400_001)
    numbers = torch.unique(torch.cat([quantize(x, "hif8"), quantize(small, "hif8"), quantize(-small, "hif8")]) + 0.0)
    assert numbers.isfinite().sum() == 256 - 3 and bool(numbers.isinf().any())  # NaN, two infinities


def test_hif4_by_hand():
    # amax 14: 14/7 = 2 is the scale. In units of it: 7 needs both micro-exponents (factor 4), so steps of 1; the next
    # group of four needs one (below 4, the group of 8 has one already), so steps of 0.5; the other eight has neither.
    x = torch.zeros(64)
    x[:4] = torch.tensor([14.0, -9.1, 1.0, 0.9])
    x[4:8] = torch.tensor([3.4, 0.5, -0.49, 6.0])
    x[8:12] = torch.tensor([3.5, 0.25, 0.24, -1.3])
    expected = torch.zeros(64)
    expected[:4] = torch.tensor([14.0, -10.0, 2.0, 0.0])
    expected[4:8] = torch.tensor([3.0, 1.0, -0.0, 6.0])
    expected[8:12] = torch.tensor([3.5, 0.5, 0.0, -1.5])
    assert torch.equal(quantize(x, "hif4"), expected)


def test_hif4_scales_are_clamped():
    scales = e6m2_scale(torch.tensor([0.0, 1e-30, 7.0, 1e30]))
    assert scales.tolist() == [2.0**-48, 2.0**-48, 1.0, 49152.0]


@pytest.mark.parametrize(
    ("name", "db"),
    [("hif4", 21.64), ("nvfp4:te", 20.43), ("nvfp4:46", 21.2), ("nvfp4:46_mae", 21.06), ("hif8", 31.5)],
)
def test_sqnr_on_normal_data(name, db):
    x = draw(512, 1024)
    sqnr = 10 * torch.log10(x.square().sum() / (x - quantize(x, name)).square().sum())
    assert sqnr.item() == pytest.approx(db, abs=0.1)


def test_nvfp4_agrees_with_transformer_engine_in_every_code():
    x = draw(512, 1024, seed=1)
    a, b = quantize(x, "nvfp4"), quantize(x, "nvfp4:te")
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=1e-6, atol=0)


def test_the_blocks_of_the_page_on_formats():
    first = torch.tensor([[7.0, 5.0, -3.4, 0.3] + [0.0] * 12])
    second = torch.tensor([[1.0, 0.6, 0.2] + [0.0] * 13])
    assert quantize(first, "nvfp4")[0, :4].tolist() == [
        7.000000476837158,
        4.6666669845581055,
        -3.500000238418579,
        0.5833333730697632,
    ]
    assert quantize(first, "nvfp4:te")[0, :4].tolist() == [
        7.0,
        4.6666669845581055,
        -3.5,
        0.5833333730697632,
    ]
    both = torch.cat([first, second])
    assert torch.allclose(quantize(both, "nvfp4:te")[1, :3], torch.tensor([1.0, 0.6667, 0.1667]), atol=1e-4)
    assert torch.allclose(quantize(both, "nvfp4:2d")[1, :3], torch.tensor([1.1667, 0.5833, 0.0]), atol=1e-4)
    large = torch.tensor([[6.0, 5.0, 4.6, 2.4] + [0.0] * 12])
    assert torch.allclose(quantize(large, "nvfp4:te")[0, :4], torch.tensor([6.0, 4.0, 4.0, 2.0]), atol=1e-5)
    assert quantize(large, "nvfp4:46")[0, :4].tolist() == [6.0, 4.5, 4.5, 2.25]


def test_four_over_six_never_errs_more_than_both_of_its_scales():
    x = draw(64, 256, seed=2) * 0.02
    blocks = x.reshape(-1, 16)
    for name, power in (("nvfp4:46", 2), ("nvfp4:46_mae", 1)):
        error = (quantize(x, name).reshape(-1, 16) - blocks).abs().pow(power).sum(-1)
        six = quantize(x, "nvfp4:te", tensor_scale=float(x.abs().max() / 1536)).reshape(-1, 16)
        assert bool((error <= (six - blocks).abs().pow(power).sum(-1) * (1 + 1e-5)).all()), name


@pytest.mark.parametrize("name", TWO_DIMENSIONAL)
class TestTwoDimensions:
    def test_a_matrix_and_its_transpose_are_quantized_alike(self, name):
        if "46" in name:
            pytest.skip("errors are added in the order of the elements, so that ties may fall otherwise")
        x = draw(48, 80)
        assert torch.equal(quantize(x.t().contiguous(), name), quantize(x, name).t())
        assert torch.equal(quantize(x, name, axis=0), quantize(x, name))

    def test_a_matrix_is_padded_to_whole_two_dimensional_blocks(self, name):
        for shape in ((1, 1), (15, 70), (17, 16), (33, 257)):
            x = draw(*shape)
            padded = torch.nn.functional.pad(x, (0, -shape[1] % 16, 0, -shape[0] % 16))
            assert torch.equal(quantize(x, name), quantize(padded, name)[: shape[0], : shape[1]]), shape

    def test_blocks_never_cross_the_matrices_of_a_stack(self, name):
        x = draw(3, 20, 24)
        alone = torch.stack([quantize(one, name, tensor_scale=0.001) for one in x])
        assert torch.equal(quantize(x, name, tensor_scale=0.001), alone)
        turned = torch.stack([quantize(one, name, tensor_scale=0.001, axis=0) for one in x])
        assert torch.equal(quantize(x, name, tensor_scale=0.001, axis=1), turned)

    def test_a_scale_for_each_row_is_refused(self, name):
        for scale in ("row", torch.ones(20, 1)):
            with pytest.raises(ValueError, match=r"blocks of .* span rows"):
                quantize(draw(20, 24), name, tensor_scale=scale)

    def test_stochastic_rounding_is_keyed_and_unbiased(self, name):
        x = torch.full((16, 16), 0.7)
        x[0, 0] = 6.0
        many = torch.stack([quantize(x, name, stochastic=Key.from_seed(seed)) for seed in range(200)])
        assert torch.equal(many[3], quantize(x, name, stochastic=Key.from_seed(3)))
        assert many[:, 1:].mean().item() == pytest.approx(0.7, abs=0.005)  # 5 standard errors
