"""Every target that this processor can run gives the same bits on 10^8 random patterns of each format."""

import functools

import pytest
import torch

from roundoff.formats.table import FORMATS
from roundoff.numerics.backend import use_backend
from roundoff.numerics.build import COMPILERS, BuildError, find_compiler, targets_for
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from tests.numerics.test_paths import KEY, random_bits, same

HERE = targets_for(torch.backends.cpu.get_cpu_capability())
KERNELS = [name for name, fmt in FORMATS.items() if fmt.has_kernel]
ROWS, COLUMNS, PIECES = 2048, 8192, 6  # 2^24 numbers at a time, 10^8 in all


@pytest.fixture(autouse=True)
def several_targets():
    try:
        find_compiler(COMPILERS)
    except BuildError:
        pytest.skip("no C++ compiler here")
    if len(HERE) < 2:
        pytest.skip("this processor has a single target")


@functools.cache
def patterns():
    """Random bits, and the same without the largest exponents in three of four rows, where blocks seldom become NaN."""
    x = random_bits(ROWS, COLUMNS, 19)
    integers = x.view(torch.int32)
    integers[ROWS // 4 :] &= ~0x40000000
    return x


def equal(a, b):
    """Whether all bits are equal, and where not, whether only NaN differ in theirs."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16)) or same(a, b)


def agree(work):
    """Whether all targets give the bits of the widest."""
    results = []
    for target in HERE:
        with use_backend(target):
            results.append(work())
    return all(equal(results[0], other) for other in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_targets_agree_on_a_hundred_million_patterns(name):
    x = patterns()
    for piece in range(PIECES):
        # Another permutation of the bits below the exponent, and other neighbours in each block.
        mixed = (x.view(torch.int32) ^ (piece * 0x2C9277 & 0x7FFFFF)).roll(piece, 1).view(torch.float32)
        assert agree(lambda mixed=mixed: quantize(mixed, name)), piece


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_targets_agree_in_bfloat16_and_in_stochastic_rounding(name):
    x = patterns()[:128]  # 10^6
    for dtype in (torch.float32, torch.bfloat16):
        for columns in (COLUMNS, 8191):
            part = x[:, :columns].to(dtype).contiguous()
            for key in (None, KEY):
                for scale in (None, "row"):
                    assert agree(lambda p=part, k=key, s=scale: quantize(p, name, tensor_scale=s, stochastic=k))


@pytest.mark.slow
def test_targets_agree_on_the_noise_of_a_hundred_million_products():
    x = patterns()
    for piece in range(PIECES):
        assert agree(lambda piece=piece: matmul_noise(x, 0.05, KEY.fold(piece)))
