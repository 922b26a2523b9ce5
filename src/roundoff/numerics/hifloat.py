"""HiFloat8 and HiFloat4, the number formats of Ascend NPUs, in plain torch.

HiF8 (arXiv:2409.16626) is an 8-bit float without a scale whose mantissa shrinks as the exponent grows in magnitude:
three bits for |exponent| <= 3, two up to 7, one up to 15, none below. Its numbers reach from 2^-22 to 2^15, halves are
rounded away from zero, and what would be rounded beyond 2^15 becomes infinite.

HiF4 (arXiv:2602.11287) has blocks of 64 elements of four bits (S1P2: 0 to 1.75 in quarters). A block has one scale in
E6M2, one extra power of two for each group of 8, and another for each group of 4 that needs it. The scale and its
reciprocal are computed in bfloat16, as the authors' routine does.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.formats.element import HIF8

from .rng import fractions_of

_BIAS = 127
HIF8_LARGEST = HIF8.high
_HIF8_SMALLEST_EXPONENT = HIF8.emin
_HIF8_OVERFLOW = 1.25 * HIF8_LARGEST  # the middle between 2^15 and the code of infinity

_SEVENTH = 0.142578125  # 1/7 in bfloat16
E6M2_SMALLEST, E6M2_LARGEST = 2.0**-48, 1.5 * 2.0**15
_GROUP, _SUBGROUP = 8, 4
_CODES = 4.0  # codes in 1: the grid of S1P2 is quarters
_LARGEST_CODE = 7.0


def hif8(x: Float[Tensor, "*shape"], words: Int[Tensor, "*shape"] | None) -> Float[Tensor, "*shape"]:
    """The float32 tensor `x` in HiF8; NaN and infinities stay.

    Args:
        x: the numbers.
        words: 32 random bits for each number (int64) for stochastic rounding, with probabilities that are multiples of
            2^-24; None rounds to nearest, halves away from zero.
    """
    magnitude = x.abs()
    exponent = (magnitude.view(torch.int32) >> 23) - _BIAS
    size = exponent.abs()
    bits = (size <= 3).to(torch.int32) + (size <= 7).to(torch.int32) + (size <= 15).to(torch.int32)
    step = ((exponent.clamp(min=_HIF8_SMALLEST_EXPONENT) - bits + _BIAS) << 23).view(torch.float32)
    quotient = magnitude / step  # exact: step is a power of two
    rounded = (_whole(quotient, words) * step).clamp(max=HIF8_LARGEST)
    result = torch.where(magnitude >= _HIF8_OVERFLOW, math.inf, rounded)
    return torch.where(x.isnan(), math.nan, result).copysign(x)


def _whole(quotient: Tensor, words: Tensor | None) -> Tensor:
    """Quotients of at least 0 as whole numbers: halves go up; with random words, up or down at random."""
    lower = quotient.floor()
    up = quotient - lower >= 0.5 if words is None else quotient - lower > fractions_of(words)
    return lower + up.to(torch.float32)


def e6m2_scale(amax: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """HiF4's scales (float32) for finite block maxima: amax / 7 in bfloat16, then in E6M2, in [2^-48, 49152]."""
    scale = (amax * _SEVENTH).to(torch.bfloat16).to(torch.float32)
    bits = scale.view(torch.int32)
    low = 21  # bits of float32's mantissa that E6M2 does not have
    rounded = (bits + ((1 << (low - 1)) - 1) + ((bits >> low) & 1)) >> low << low  # to nearest, ties to even
    return rounded.view(torch.float32).clamp(E6M2_SMALLEST, E6M2_LARGEST)


def hif4(
    blocks: Float[Tensor, "rows blocks size"], words: Int[Tensor, "rows blocks size"] | None
) -> Float[Tensor, "rows blocks size"]:
    """Blocks of 64 float32 numbers in HiF4; a block that holds NaN or an infinity becomes NaN throughout.

    Args:
        blocks: the numbers.
        words: 32 random bits for each number (int64) for stochastic rounding; None rounds to nearest, halves away from
            zero.
    """
    magnitude = blocks.abs()
    amax = magnitude.amax(-1, keepdim=True)
    finite = amax.isfinite()
    scale = e6m2_scale(torch.where(finite, amax, 0.0))
    reciprocal = (1.0 / scale).to(torch.bfloat16).to(torch.float32)
    relative = torch.where(finite, magnitude, 0.0) * reciprocal
    groups = relative.reshape(*blocks.shape[:-1], -1, _GROUP // _SUBGROUP, _SUBGROUP)  # [rows, blocks, 8, 2, 4]
    of_four = groups.amax(-1, keepdim=True)
    of_eight = of_four.amax(-2, keepdim=True)
    eight = torch.where(of_eight >= 4.0, 2.0, 1.0)  # micro-exponents as factors
    micro = eight * torch.where(of_four >= 2.0 * eight, 2.0, 1.0)
    quotient = groups / micro * _CODES
    code = _whole(quotient, None if words is None else words.reshape(groups.shape)).clamp(max=_LARGEST_CODE)
    value = (code * (micro / _CODES)).flatten(-3) * scale
    return torch.where(finite, value, math.nan).copysign(blocks)
