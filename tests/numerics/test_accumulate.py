"""Accumulators of few bits against sums written out in exact fractions, and what they do to long sums."""

import math
from fractions import Fraction

import pytest
import torch

from roundoff.numerics.accumulate import PartialSums, accumulated
from roundoff.numerics.backend import use_backend
from roundoff.numerics.build import targets_for
from roundoff.numerics.quantize import quantize
from tests.numerics.test_paths import random_bits, random_blocks, same


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(value, bits):
    """The last place of a fraction with this many bits after the leading one."""
    return Fraction(2) ** (math.frexp(float(value))[1] - 1 - bits) if value else Fraction(1)


def cut(value, step):
    return math.trunc(value / step) * step


def written_out(a, b, sums):
    """One output in exact fractions; promotion rounds to float32."""
    products = [Fraction(float(x)) * Fraction(float(w)) for x, w in zip(a, b, strict=True)]
    if sums.rounding == "align":
        products = [Fraction(float(torch.tensor(float(t), dtype=torch.float32))) for t in products]
    total = torch.tensor(0.0)
    for start in range(0, len(products), sums.promote):
        p = Fraction(0)
        chunk = products[start : start + sums.promote]
        for first in range(0, len(chunk), sums.group):
            group = chunk[first : first + sums.group]
            if sums.rounding == "align":
                u = unit(max([abs(p), *map(abs, group)]), sums.mantissa)
                p = cut(p, u) + sum(cut(t, u) for t in group)
                p = cut(p, unit(p, sums.mantissa))
            else:
                exact = p + sum(group)
                step = unit(exact, sums.mantissa)
                if sums.half:
                    step = max(step, Fraction(2) ** -24)
                p = cut(exact, step) if sums.rounding == "truncate" else round(exact / step) * step
        total = total + torch.tensor(float(p), dtype=torch.float32)
    return total


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["align", "truncate", "nearest"])
@pytest.mark.parametrize(("mantissa", "promote", "group"), [(13, 32, 8), (4, 16, 16), (7, 64, 1), (23, 128, 32)])
def test_each_output_is_the_sum_written_out(mantissa, promote, group, rounding, dtype, path):
    sums = PartialSums(mantissa, promote, group, rounding)
    a = (normal(5, 70) * torch.logspace(-3, 3, 70)).to(dtype)
    b = normal(6, 70, seed=1).to(dtype)
    expected = torch.stack([torch.stack([written_out(x, w, sums) for w in b]) for x in a])
    with use_backend(path):
        assert torch.equal(accumulated(a, b, sums), expected.to(dtype))
        few = PartialSums(2, promote, group, rounding)
        assert not torch.equal(accumulated(a, b, few), expected.to(dtype))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("mantissa", "promote", "group"), [(13, 128, 32), (2, 1, 1), (10, 60, 60), (23, 127, 127)])
@pytest.mark.parametrize("target", targets_for(torch.backends.cpu.get_cpu_capability()))
def test_the_kernel_and_plain_torch_give_the_same_bits(target, mantissa, promote, group, half):
    sums = PartialSums(mantissa, promote, group, "align", half)
    cases = [(make(40, 200, 3), make(37, 200, 4)) for make in (random_bits, random_blocks)]
    cases += [(normal(40, 200) * scale, normal(37, 200, seed=1)) for scale in (1e-38, 1e-20, 1.0, 300.0, 1e37)]
    cases.append((normal(1, 5), normal(1, 5)))
    threads = torch.get_num_threads()
    for a, b in cases:
        with use_backend("torch"):
            expected = accumulated(a, b, sums)
        torch.set_num_threads(2)
        try:
            with use_backend(target):
                assert same(expected, accumulated(a, b, sums))
        finally:
            torch.set_num_threads(threads)


def test_the_kernel_splits_its_rows_over_threads():
    a, b, sums = normal(700, 64), normal(64, 64, seed=1), PartialSums(13, 128, 32, "align")
    threads = torch.get_num_threads()
    expected = accumulated(a, b, sums)
    torch.set_num_threads(2)
    try:
        assert torch.equal(accumulated(a, b, sums), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_example_of_the_docstring():
    # 3 bits, groups of 2: first 8 (and 0), then 1.75 and -0.9; 8 + 1.75 - 0.9 = 8.85 between 8 and 9.
    a, b = torch.tensor([[8.0, 0.0, 1.75, -0.9]]), torch.ones(1, 4)
    found = {r: float(accumulated(a, b, PartialSums(3, 4, 2, r))) for r in ("align", "truncate", "nearest")}
    assert found == {"align": 9.0, "truncate": 8.0, "nearest": 9.0}
    # Ties go to the even neighbour: 8.5 to 8 (1.000), 9.5 to 10 (1.010).
    ones = torch.ones(1, 2)
    ties = [float(accumulated(torch.tensor([[8.0, x]]), ones, PartialSums(3, 2, 2, "nearest"))) for x in (0.5, 1.5)]
    assert ties == [8.0, 10.0]


def test_a_partial_sum_in_float16_has_its_range():
    ones = torch.ones(1, 4)

    def one(values, rounding="nearest", promote=4):
        return float(accumulated(torch.tensor([values]), ones, PartialSums(10, promote, 1, rounding, half=True)))

    assert one([65504.0, 15.0, 0.0, 0.0]) == 65504.0
    assert one([65504.0, 16.0, 0.0, 0.0]) == math.inf  # 65520 is the tie, which rounds beyond the range
    assert one([-60000.0, -60000.0, 0.0, 0.0], "align") == -math.inf
    assert one([60000.0, 60000.0, 0.0, 0.0], promote=1) == 120000.0  # promoted before it overflows
    assert one([1.5 * 2.0**-24, 0.0, 0.0, 0.0]) == 2.0**-23  # subnormal: multiples of 2^-24, ties to even
    assert one([1.5 * 2.0**-24, 0.0, 0.0, 0.0], "align") == 2.0**-24
    assert accumulated(torch.full((1, 4), 2.0**-30), ones, PartialSums(10, 4, 1, "nearest")).item() == 2.0**-28


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("rounding", ["align", "truncate", "nearest"])
def test_infinities_and_nan_are_kept(rounding, path):
    a = torch.tensor([[1.0, math.inf, 2.0], [1.0, -math.inf, 2.0], [math.nan, 1.0, 1.0], [1e-45, 3e38, 3e38]])
    with use_backend(path):
        y = accumulated(a, torch.ones(1, 3), PartialSums(13, 128, 32, rounding))[:, 0]
    assert y[0] == math.inf and y[1] == -math.inf and y[2].isnan() and y[3] == math.inf


@pytest.mark.parametrize("rounding", ["align", "truncate", "nearest"])
def test_rows_may_be_split_and_operands_may_be_empty(rounding, monkeypatch):
    sums = PartialSums(13, 128, 32, rounding)
    a, b = normal(37, 200), normal(29, 200, seed=1)
    whole = accumulated(a, b, sums)
    with use_backend("torch"):
        assert torch.equal(torch.cat([accumulated(part, b, sums) for part in a.split(11)]), whole)
    assert torch.equal(torch.cat([accumulated(part, b, sums) for part in a.split(5)]), whole)
    monkeypatch.setattr("roundoff.numerics.accumulate.PRODUCTS", 32 * 10)  # fewer than one row of outputs
    monkeypatch.setattr("roundoff.numerics.accumulate.OUTPUTS", 10)
    with use_backend("torch"):
        assert torch.equal(accumulated(a, b, sums), whole)
    huge = PartialSums(13, 1 << 30, 1 << 30, rounding)  # a group of all products, whatever its size
    assert torch.equal(accumulated(a, b, huge), accumulated(a, b, PartialSums(13, 200, 200, rounding)))
    assert accumulated(a[:0], b, sums).shape == (0, 29) and not accumulated(a[:, :0], b[:, :0], sums).any()


@pytest.mark.parametrize("rounding", ["align", "truncate", "nearest"])
def test_with_23_bits_and_one_group_it_is_the_plain_product(rounding):
    a, b = normal(40, 300), normal(30, 300, seed=1)
    y, exact = accumulated(a, b, PartialSums(23, 512, 512, rounding)), a.double() @ b.double().t()
    # Under align, each of 300 products may lose a unit of the largest (below 16): 300 * 16 * 2^-23.
    assert (y - exact).abs().max() < (300 * 16 * 2.0**-23 if rounding == "align" else 64 * 2.0**-23)


def relative_errors(k, promote, rounding="align", mantissa=13, positive=True):
    """Mean and root mean square of the error of sums of k FP8 products, relative to the exact sum."""
    a, b = normal(64, k), normal(64, k, seed=1)
    a, b = (quantize(t.abs() if positive else t, "fp8_e4m3", tensor_scale="row") for t in (a, b))
    exact = a.double() @ b.double().t()
    scale = exact if positive else (a.double().square() @ b.double().square().t()).sqrt()
    error = (accumulated(a, b, PartialSums(mantissa, promote, 32, rounding)).double() - exact) / scale
    return float(error.mean()), float(error.square().mean().sqrt())


def test_the_error_grows_with_the_length_and_promotion_stops_it():
    short, long, promoted = relative_errors(256, 1 << 20), relative_errors(4096, 1 << 20), relative_errors(4096, 128)
    assert long[0] < 0 and long[1] == pytest.approx(-long[0], rel=0.3)  # truncation makes every sum too small
    assert long[1] > 5 * short[1]
    assert promoted[1] < 0.1 * long[1]
    # Measured: 0.46 % for K = 256 and 8 % for K = 4096; 0.22 % with promotion.
    assert 0.06 < long[1] < 0.1 and 0.001 < promoted[1] < 0.004


def test_rounding_to_nearest_has_no_bias_and_cutting_single_products_costs_more_than_cutting_their_sum():
    nearest, cut_sums = relative_errors(4096, 128, "nearest"), relative_errors(4096, 128, "truncate")
    aligned = relative_errors(4096, 128, "align")
    assert abs(nearest[0]) < 0.05 * abs(cut_sums[0])
    assert cut_sums[0] < 0 and aligned[0] < 2 * cut_sums[0]
    signed = {r: relative_errors(4096, 128, r, positive=False)[1] for r in ("nearest", "truncate", "align")}
    assert signed["nearest"] < signed["truncate"] < signed["align"]


def test_arguments_that_cannot_be_used():
    for bad in ({"mantissa": 24}, {"mantissa": 1}, {"promote": 0, "group": 0}, {"promote": 48}):
        with pytest.raises(ValueError, match="mantissa must be 2 to 23"):
            PartialSums(**{"mantissa": 13, "promote": 128, "group": 32, "rounding": "align"} | bad)


@pytest.mark.usefixtures("unchecked_shapes")
def test_operands_that_do_not_fit():
    sums = PartialSums(13, 128, 32, "align")
    for b in (torch.ones(3, 5), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4)):
        with pytest.raises(ValueError, match="operands must be"):
            accumulated(torch.ones(2, 4), b, sums)
