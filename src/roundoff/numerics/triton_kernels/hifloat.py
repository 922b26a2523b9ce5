"""Device functions: HiFloat8 and HiFloat4, as in `numerics/hifloat.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels.rounding import (
    EXPONENT,
    MAGNITUDE,
    bits,
    narrowed,
    not_a_number,
    real,
    uniforms,
    widened,
    with_sign,
)

HIF8_LARGEST = tl.constexpr(2.0**15)
HIF8_OVERFLOW = tl.constexpr(1.25 * 2.0**15)
HIF8_EMIN = tl.constexpr(-22)
SEVENTH = tl.constexpr(0.142578125)  # 1/7 in bfloat16
E6M2_SMALLEST, E6M2_LARGEST = tl.constexpr(2.0**-48), tl.constexpr(1.5 * 2.0**15)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def whole(quotient, words, RANDOM: tl.constexpr):
    """Quotients of at least 0 and below 2^23 as whole numbers: halves go up, or up or down by random words."""
    lower = quotient.to(tl.int32).to(tl.float32)
    if RANDOM:
        up = quotient - lower > uniforms(words)
    else:
        up = quotient - lower >= 0.5
    return lower + tl.where(up, 1.0, 0.0)


@triton.jit
def hif8(v, words, RANDOM: tl.constexpr):
    """Numbers in HiF8; NaN and infinities stay."""
    magnitude = real(bits(v) & MAGNITUDE)
    exponent = (bits(magnitude) >> 23) - 127
    size = tl.where(exponent < 0, -exponent, exponent)
    mantissa = (size <= 3).to(tl.int32) + (size <= 7).to(tl.int32) + (size <= 15).to(tl.int32)
    # Above 2^16 all is infinite; the bound keeps the quotient of such a number small.
    step = tl.minimum(tl.maximum(exponent, HIF8_EMIN), 16) - mantissa
    quotient = tl.minimum(magnitude, 2 * HIF8_LARGEST) * real((127 - step) << 23)  # a power of two, so exact
    rounded = tl.minimum(whole(quotient, words, RANDOM) * real((127 + step) << 23), HIF8_LARGEST)
    rounded = tl.where(magnitude >= HIF8_OVERFLOW, INFINITY, rounded)
    return with_sign(tl.where(bits(magnitude) > EXPONENT, not_a_number(v), rounded), v)


@triton.jit
def e6m2_scale(amax, INTERPRETED: tl.constexpr):
    """HiF4's scales for finite block maxima: amax / 7 in bfloat16, then in E6M2."""
    b = bits(widened(narrowed(amax * SEVENTH, tl.bfloat16, INTERPRETED)))
    b = ((b + ((1 << 20) - 1 + ((b >> 21) & 1))) >> 21) << 21  # float32 has 21 more bits of mantissa
    return tl.minimum(tl.maximum(real(b), E6M2_SMALLEST), E6M2_LARGEST)


@triton.jit
def hif4(v, words, amax_bits, RANDOM: tl.constexpr, INTERPRETED: tl.constexpr):
    """Blocks [blocks, 64] in HiF4, with the bits of their maxima."""
    BLOCKS: tl.constexpr = v.shape[0]
    finite = amax_bits < EXPONENT
    scale = e6m2_scale(real(tl.where(finite, amax_bits, 0)), INTERPRETED)
    reciprocal = widened(narrowed(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), tl.bfloat16, INTERPRETED))
    relative = tl.where(finite[:, None], real(bits(v) & MAGNITUDE), 0.0) * reciprocal[:, None]
    groups = tl.reshape(relative, (BLOCKS, 8, 2, 4))
    of_four = tl.max(groups, 3)
    of_eight = tl.max(of_four, 2)
    eight = tl.where(of_eight >= 4.0, 2.0, 1.0)[:, :, None]
    micro = (eight * tl.where(of_four >= 2.0 * eight, 2.0, 1.0))[:, :, :, None]  # 1, 2 or 4
    back = tl.where(micro == 4.0, 0.25, tl.where(micro == 2.0, 0.5, 1.0))
    quotient = tl.minimum(groups * back * 4.0, 1024.0)
    code = tl.minimum(whole(quotient, tl.reshape(words, (BLOCKS, 8, 2, 4)), RANDOM), 7.0)
    value = tl.reshape(code * (micro * 0.25), (BLOCKS, 64)) * scale[:, None]
    return with_sign(tl.where(finite[:, None], value, not_a_number(v)), v)
