"""Device functions: storage types, and rounding to the grid of an element, as in `numerics/grid.py`.

They work on float32 numbers and their bits. A number that is not finite is dealt with by whoever calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x007FFFFF)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
QUIET_NAN = tl.constexpr(0x7FC00000)
STEP_OF_WORDS = tl.constexpr(2.0**-24)
TIES_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and subtracted, it rounds to an integer


@triton.jit
def bits(v):
    """The bits of float32 numbers, as int32."""
    return v.to(tl.int32, bitcast=True)


@triton.jit
def real(b):
    """The float32 numbers with these bits."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def not_a_number(v):
    """NaN in the shape of `v`."""
    return real(tl.full(v.shape, QUIET_NAN, tl.int32))


@triton.jit
def with_sign(magnitude, of):
    """Numbers with these magnitudes and the signs of others."""
    return real((bits(magnitude) & MAGNITUDE) | (bits(of) & SIGN))


@triton.jit
def widened(v):
    """Stored numbers as float32."""
    if v.dtype == tl.bfloat16:
        wide = real(v.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        wide = v.to(tl.float32)
    return wide


@triton.jit
def narrowed(v, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 numbers as they are stored: rounded to nearest, ties to even.

    A device has an instruction for that. Triton's interpreter cuts bits off where it should round to bfloat16, so
    there (and only there) the rounding is done on the bits.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        b = bits(v)
        rounded = tl.where((b & MAGNITUDE) > EXPONENT, QUIET_NAN >> 16, (b + (((b >> 16) & 1) + 0x7FFF)) >> 16)
        stored = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        stored = v.to(DTYPE)
    return stored


@triton.jit
def nearest(v, LAYOUT: tl.constexpr):
    """Round to the nearest number of the grid, ties to even; beyond the grid saturate."""
    if LAYOUT.mantissa == 0:
        t = tl.maximum(tl.minimum(v, LAYOUT.high), LAYOUT.low)
        rounded = (t + TIES_TO_EVEN) - TIES_TO_EVEN
    else:
        rounded = nearest_float(v, LAYOUT.mantissa, LAYOUT.emin, LAYOUT.high)
    return with_sign(rounded, v)


@triton.jit
def nearest_float(v, MANTISSA_BITS: tl.constexpr, EMIN: tl.constexpr, HIGH: tl.constexpr):
    """The magnitude of the nearest number of a floating-point grid."""
    t = tl.minimum(real(bits(v) & MAGNITUDE), HIGH)
    spacing = tl.maximum(bits(t) & EXPONENT, (EMIN + 127) << 23)
    c = real(spacing + ((23 - MANTISSA_BITS) << 23))
    return (t + c) - c


@triton.jit
def uniforms(words):
    """Uniform numbers in [0, 1), multiples of 2^-24, from random words (uint32)."""
    return (words >> 8).to(tl.float32) * STEP_OF_WORDS


@triton.jit
def stochastic(v, words, LAYOUT: tl.constexpr):
    """Round to one of the two neighbours on the grid, by random words (uint32), so that the mean is unchanged."""
    t = tl.maximum(tl.minimum(v, LAYOUT.high), LAYOUT.low)
    magnitude = real(bits(t) & MAGNITUDE)
    if LAYOUT.mantissa == 0:
        quotient = magnitude
    else:
        spacing = tl.maximum(bits(magnitude) & EXPONENT, (LAYOUT.emin + 127) << 23) - (LAYOUT.mantissa << 23)
        quotient = magnitude * real((254 << 23) - spacing)  # the reciprocal of a power of two, which is exact
    lower = quotient.to(tl.int32).to(tl.float32)  # at most 2^23
    rounded = lower + tl.where(uniforms(words) < quotient - lower, 1.0, 0.0)
    if LAYOUT.mantissa != 0:
        rounded = rounded * real(spacing)
    return with_sign(rounded, v)


@triton.jit
def rounded_to_grid(v, words, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Round to nearest, or by random words."""
    if RANDOM:
        rounded = stochastic(v, words, LAYOUT)
    else:
        rounded = nearest(v, LAYOUT)
    return rounded
