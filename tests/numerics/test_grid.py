"""Values computed by hand: every FP4 code, every tie, the scale rules, and the worked block of formats.py."""

import pytest
import torch

from roundoff.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2
from roundoff.formats.table import FORMATS, get_format
from roundoff.numerics.backend import use_backend
from roundoff.numerics.quantize import quantize

CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# The midpoint of neighbours i and i + 1 is rounded to the code with an even index (mantissa bit 0).
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


def block(values, anchor, size):
    """A block with `values` and with `anchor`, which determines the scale."""
    return torch.tensor([*values, anchor] + [0.0] * (size - 1 - len(values)))


def fp4(values, exponent=0):
    """Round `values` to the FP4 grid at scale 2^exponent, which an amax of 6 * 2^exponent gives."""
    factor = 2.0**exponent
    x = block([v * factor for v in values], 6.0 * factor, 32)
    return (quantize(x, "mxfp4")[: len(values)] / factor).tolist()


@pytest.mark.parametrize("exponent", [-120, -3, 0, 5, 124])
def test_every_code_is_kept(exponent):
    codes = CODES + [-c for c in CODES]
    assert fp4(codes, exponent) == codes


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_every_tie_goes_to_the_even_code(exponent):
    ties = list(TIES) + [-t for t in TIES]
    assert fp4(ties, exponent) == list(TIES.values()) + [-v for v in TIES.values()]


def test_beside_a_tie_the_nearer_code_wins():
    # The neighbours in float32; those in float64 would be too close.
    up = [float(torch.nextafter(torch.tensor(t), torch.tensor(9.0))) for t in TIES]
    down = [float(torch.nextafter(torch.tensor(t), torch.tensor(0.0))) for t in TIES]
    assert fp4(up) == CODES[1:]
    assert fp4(down) == CODES[:-1]


def test_worked_block_of_the_docstring():
    x = block([0.30, -1.00, 2.50], 7.00, 32)
    assert quantize(x, "mxfp4")[:4].tolist() == [0.5, -1.0, 2.0, 6.0]
    assert quantize(x, "mxfp4:ceil")[:4].tolist() == [0.0, -1.0, 2.0, 8.0]


@pytest.mark.parametrize(
    ("rule", "amax", "scale"),
    [
        # floor: 2^(floor(log2 amax) - 2)
        *[("floor", 4.0, 1.0), ("floor", 7.99, 1.0), ("floor", 8.0, 2.0)],
        # ceil: 2^(ceil(log2 amax) - 2)
        *[("ceil", 4.0, 1.0), ("ceil", 4.01, 2.0), ("ceil", 8.0, 2.0)],
        # even: amax is rounded to one mantissa bit, so that from 1.75 * 2^e on it is the next power of two
        *[("even", 6.99, 1.0), ("even", 7.0, 2.0), ("even", 5.0, 1.0)],
        # rceil: the smallest power of two with amax / scale <= 6
        *[("rceil", 6.0, 1.0), ("rceil", 6.01, 2.0), ("rceil", 3.0, 0.5), ("rceil", 4.0, 1.0)],
    ],
)
def test_scale_rules_choose_the_documented_scale(rule, amax, scale):
    # 0.5 * scale is the smallest code: 0.26 * scale rounds up to it, 0.24 * scale rounds to zero.
    name = "mxfp4" if rule == "floor" else f"mxfp4:{rule}"
    x = block([0.26 * scale, 0.24 * scale], amax, 32)
    assert quantize(x, name)[:2].tolist() == [0.5 * scale, 0.0]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_each_grid_ends_at_its_largest_number(name):
    # OCP MX v1.0, tables 2 to 5: 6, 7.5, 28, 448 (no infinity), 57344.
    largest = {"mxfp4": 6, "mxfp6_e2m3": 7.5, "mxfp6_e3m2": 28, "mxfp8_e4m3": 448, "mxfp8_e5m2": 57344}[name]
    x = block([-float(largest)], float(largest), 32)
    assert quantize(x, name)[:2].tolist() == [-largest, largest]
    too_large = largest * 1.06  # same binade, beyond the last code: saturates
    assert quantize(block([], too_large, 32), name)[0].item() == largest


@pytest.mark.parametrize(
    ("element", "smallest"), [(E2M1, 0.5), (E2M3, 0.125), (E3M2, 0.0625), (E4M3, 2**-9), (E5M2, 2**-16)]
)
def test_each_grid_has_its_smallest_subnormal(element, smallest):
    name = next(f.name for f in FORMATS.values() if f.element is element and f.scale == "e8m0")
    x = block([smallest, smallest * 0.51, smallest * 0.5], element.high, 32)
    assert quantize(x, name)[:3].tolist() == [smallest, smallest, 0.0]


def test_nvfp4_worked_block():
    # The tensor scale is 1/64. (3 / 6) / (1/64) = 32 is an E4M3 number, so the block scale is 0.5 and a step is 0.25.
    x = block([0.25, 0.125, 0.374, 1.25], 3.0, 16)
    q = quantize(x, "nvfp4", tensor_scale=1 / 64)
    assert q[:5].tolist() == [0.25, 0.0, 0.25, 1.0, 3.0]  # 0.125 and 1.25 / 0.5 = 2.5 are ties to even


def test_nvfp4_block_scale_rounds_to_e4m3():
    # amax / 6 = 1.0625 is a tie between the E4M3 numbers 1 and 1.125, of which 1 is even; so amax saturates at 6.
    assert quantize(block([], 6.375, 16), "nvfp4_block")[0].item() == 6.0


def test_int8_and_int4_follow_their_conventions():
    x = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5])
    assert quantize(x, "int8").tolist() == [127.0, -127.0, 0.0, 2.0, 2.0, -0.0]
    y = torch.tensor([-7.5, 7.5, 3.0])  # amax / 7.5 = 1 on [-8, 7]: -7.5 is a tie to -8, 7.5 saturates at 7
    assert quantize(y, "int4:full").tolist() == [-8.0, 7.0, 3.0]


def test_default_rule_may_be_spelled_out():
    assert get_format("mxfp4:floor") is FORMATS["mxfp4"]
