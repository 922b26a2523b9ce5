"""Device functions: storage types, rounding to the grid of an element, and the scales of blocks.

They compute what `numerics/blocks.py` does, on float32 numbers and their bits. A number that is not finite is dealt
with by whoever calls them: its block has a scale of NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels import layout

EXPONENT = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x007FFFFF)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
QUIET_NAN = tl.constexpr(0x7FC00000)
SMALLEST_SCALE = tl.constexpr(0x400000)  # the bits of 2^-127
STEP_OF_WORDS = tl.constexpr(2.0**-24)
TIES_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and subtracted, it rounds to an integer
E4M3_MAX = tl.constexpr(448.0)
NONE, E8M0, E4M3 = tl.constexpr(layout.NONE), tl.constexpr(layout.E8M0), tl.constexpr(layout.E4M3)
CEIL, EVEN, RCEIL = tl.constexpr(layout.CEIL), tl.constexpr(layout.EVEN), tl.constexpr(layout.RCEIL)


@triton.jit
def bits(v):
    """The bits of float32 numbers, as int32."""
    return v.to(tl.int32, bitcast=True)


@triton.jit
def real(b):
    """The float32 numbers with these bits."""
    return b.to(tl.float32, bitcast=True)


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
    if INTERPRETED and DTYPE == tl.bfloat16:
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
    return real((bits(rounded) & MAGNITUDE) | (bits(v) & SIGN))


@triton.jit
def nearest_float(v, MANTISSA_BITS: tl.constexpr, EMIN: tl.constexpr, HIGH: tl.constexpr):
    """The magnitude of the nearest number of a floating-point grid."""
    t = tl.minimum(real(bits(v) & MAGNITUDE), HIGH)
    spacing = tl.maximum(bits(t) & EXPONENT, (EMIN + 127) << 23)
    c = real(spacing + ((23 - MANTISSA_BITS) << 23))
    return (t + c) - c


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
    threshold = (words >> 8).to(tl.float32) * STEP_OF_WORDS
    rounded = lower + tl.where(threshold < quotient - lower, 1.0, 0.0)
    if LAYOUT.mantissa != 0:
        rounded = rounded * real(spacing)
    return real((bits(rounded) & MAGNITUDE) | (bits(v) & SIGN))


@triton.jit
def rounded_to_grid(v, words, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Round to nearest, or by random words."""
    if RANDOM:
        rounded = stochastic(v, words, LAYOUT)
    else:
        rounded = nearest(v, LAYOUT)
    return rounded


@triton.jit
def power_of_two(amax, LAYOUT: tl.constexpr):
    """The biased exponent of the E8M0 scale of blocks with these finite maxima, 0 to 254."""
    if LAYOUT.rule == RCEIL:
        amax = tl.div_rn(amax, tl.full(amax.shape, LAYOUT.divisor, tl.float32))
    b = bits(amax)
    if LAYOUT.rule == EVEN:
        b += 1 << (22 - LAYOUT.mantissa)
    e = b >> 23
    if LAYOUT.rule == CEIL:
        e += ((b & MANTISSA) != 0).to(tl.int32)
    if LAYOUT.rule == RCEIL:
        # A subnormal quotient is above 2^-127 if and only if its bits as an integer exceed 2^22.
        e += (b > tl.where(b < 0x800000, SMALLEST_SCALE, b & ~MANTISSA)).to(tl.int32)
    else:
        e -= LAYOUT.emax
    return tl.minimum(tl.maximum(e, 0), 254)


@triton.jit
def scales_of(amax_bits, tensor_scale, LAYOUT: tl.constexpr):
    """Scales of blocks from the bits of their maxima: by which to multiply, and by which to divide.

    Under E8M0 the second is the reciprocal of the first, an exact power of two; otherwise it is the first, or 1 if that
    is 0. A block that holds a number that is not finite has a scale of NaN.
    """
    finite = amax_bits < EXPONENT
    amax = real(tl.where(finite, amax_bits, 0))
    if LAYOUT.scale == E8M0:
        e = power_of_two(amax, LAYOUT)
        scale = real(tl.where(e == 0, SMALLEST_SCALE, e << 23))
        divide = real(tl.where(e == 254, SMALLEST_SCALE, (254 - e) << 23))
    else:
        scale = tl.div_rn(amax, tl.full(amax.shape, LAYOUT.divisor, tl.float32))
        if LAYOUT.scale == E4M3:
            if LAYOUT.tensor_divisor != 0:
                # A tensor scale that underflowed to 0 makes every element zero.
                none = tensor_scale == 0
                scale = tl.where(none, 0.0, tl.div_rn(scale, tl.where(none, 1.0, tensor_scale)))
            scale = nearest_float(scale, 3, -6, E4M3_MAX)
            if LAYOUT.tensor_divisor != 0:
                scale = scale * tensor_scale
        divide = tl.where(scale == 0, 1.0, scale)
    return tl.where(finite, scale, real(tl.full(scale.shape, QUIET_NAN, tl.int32))), divide


@triton.jit
def quantized(v, words, multiply, divide, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Elements divided by their scales, rounded, and multiplied again; NaN where the scale is NaN."""
    if LAYOUT.scale == E8M0:
        q = v * divide
    else:
        q = tl.div_rn(v, tl.broadcast_to(divide, v.shape))
    # Rounding may lose a NaN (a minimum with a number is that number); the product with the scale restores it.
    return rounded_to_grid(q, words, LAYOUT, RANDOM) * multiply
