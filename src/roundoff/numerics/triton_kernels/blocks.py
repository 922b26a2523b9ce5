"""Device functions: scales of blocks and of tensors, and blocks under them, as in `numerics/blocks.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics import blocks as sources
from roundoff.numerics.triton_kernels import layout
from roundoff.numerics.triton_kernels.hifloat import hif4, hif8
from roundoff.numerics.triton_kernels.nvfp4 import encoding_scale, reciprocal, transformer_engine
from roundoff.numerics.triton_kernels.rounding import (
    EXPONENT,
    MAGNITUDE,
    MANTISSA,
    bits,
    nearest_float,
    not_a_number,
    real,
    rounded_to_grid,
)

E8M0, E4M3 = tl.constexpr(layout.E8M0), tl.constexpr(layout.E4M3)
FLOAT32, E6M2 = tl.constexpr(layout.FLOAT32), tl.constexpr(layout.E6M2)
CEIL, EVEN, RCEIL = tl.constexpr(layout.CEIL), tl.constexpr(layout.EVEN), tl.constexpr(layout.RCEIL)
TE = tl.constexpr(layout.TE)
FROM_TENSOR, GIVEN = tl.constexpr(sources.FROM_TENSOR), tl.constexpr(sources.GIVEN)
GIVEN_ROWS, GIVEN_ONE = tl.constexpr(sources.GIVEN_ROWS), tl.constexpr(layout.GIVEN_ONE)
FROM_MAXIMA = tl.constexpr(layout.FROM_MAXIMA)
SMALLEST_SCALE = tl.constexpr(0x400000)  # the bits of 2^-127
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def finite_magnitudes(v):
    """The bits of magnitudes, 0 for numbers that are not finite."""
    magnitude = bits(v) & MAGNITUDE
    return tl.where(magnitude < EXPONENT, magnitude, 0)


@triton.jit
def divided(v, DIVISOR: tl.constexpr):
    """`v` over a constant, correctly rounded."""
    return tl.div_rn(v, tl.full(v.shape, DIVISOR, tl.float32))


@triton.jit
def scale_of_maximum(amax, LAYOUT: tl.constexpr):
    """The tensor scale from the largest finite magnitude of a tensor or of a row (an encoding scale under `TE`)."""
    if LAYOUT.rule >= TE:
        scale = encoding_scale(amax, LAYOUT)
    else:
        scale = divided(amax, LAYOUT.tensor_divisor)
    return scale


@triton.jit
def tensor_scale_of(scales, scalar, row, inside, LAYOUT: tl.constexpr, SOURCE: tl.constexpr):
    """The tensor scale that applies to each of these rows."""
    if SOURCE == FROM_TENSOR:
        scale = scale_of_maximum(tl.full(row.shape, 0.0, tl.float32) + tl.load(scales), LAYOUT)
    elif SOURCE == FROM_MAXIMA:
        scale = scale_of_maximum(tl.load(scales + row, mask=inside, other=0.0), LAYOUT)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
        if SOURCE == GIVEN:
            scale = scale * scalar
        if SOURCE == GIVEN_ONE:
            scale = scale * tl.load(scales)
        if SOURCE == GIVEN_ROWS:
            scale = tl.load(scales + row, mask=inside, other=1.0)
        if LAYOUT.rule >= TE and SOURCE != 0:
            scale = reciprocal(scale)
    return scale


@triton.jit
def power_of_two(amax, LAYOUT: tl.constexpr):
    """The biased exponent of the E8M0 scale of blocks with these finite maxima, 0 to 254."""
    if LAYOUT.rule == RCEIL:
        amax = divided(amax, LAYOUT.divisor)
    b = bits(amax)
    if LAYOUT.rule == EVEN:
        b += 1 << (22 - (LAYOUT.mantissa if LAYOUT.mantissa else LAYOUT.emax))
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
        scale = divided(amax, LAYOUT.divisor)
        if LAYOUT.scale == E4M3:
            if LAYOUT.tensor_divisor != 0:
                # A tensor scale that underflowed to 0 makes every element zero.
                none = tensor_scale == 0
                scale = tl.where(none, 0.0, tl.div_rn(scale, tl.where(none, 1.0, tensor_scale)))
            scale = nearest_float(scale, 3, -6, E4M3_MAX)
            if LAYOUT.tensor_divisor != 0:
                scale = scale * tensor_scale
        divide = tl.where(scale == 0, 1.0, scale)
    return tl.where(finite, scale, not_a_number(scale)), divide


@triton.jit
def quantized_blocks(
    v,
    words,
    amax_bits,
    tensor_scale,
    takes_second,
    LAYOUT: tl.constexpr,
    RANDOM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Blocks [blocks, N], with the bits of their maxima and the tensor scale of each."""
    if LAYOUT.scale == E6M2:
        q = hif4(v, words, amax_bits, RANDOM, INTERPRETED)
    elif LAYOUT.rule >= TE:
        q = transformer_engine(v, words, amax_bits, tensor_scale, takes_second, LAYOUT, RANDOM)
    else:
        multiply, divide = scales_of(amax_bits, tensor_scale, LAYOUT)
        if LAYOUT.scale == E8M0:
            q = v * divide[:, None]
        else:
            q = tl.div_rn(v, tl.broadcast_to(divide[:, None], v.shape))
        # Rounding may lose a NaN (a minimum with a number is that number); the product with the scale restores it.
        q = rounded_to_grid(q, words, LAYOUT, RANDOM) * multiply[:, None]
    return q


@triton.jit
def under_known_scale(v, words, scale, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Elements under a scale [rows, 1] that is known; numbers that are not finite become NaN, except in HiF8."""
    if LAYOUT.tapered:
        q = hif8(v, words, RANDOM)
    else:
        q = tl.div_rn(v, tl.broadcast_to(tl.where(scale == 0, 1.0, scale), v.shape))
        q = rounded_to_grid(q, words, LAYOUT, RANDOM) * scale
        q = tl.where((bits(v) & MAGNITUDE) < EXPONENT, q, not_a_number(v))
    return q
