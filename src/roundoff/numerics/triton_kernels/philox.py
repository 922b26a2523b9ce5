"""Device functions: the random words of `numerics/rng.py`, and normal numbers from them, to the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels.rounding import MANTISSA, bits, real

MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
WEYL_0, WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(7)
ANGLE_STEP = tl.constexpr(float.fromhex("0x1.921fb6p-32"))  # pi/4 / 2^31
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def low_half(v):
    """The low 32 bits of 64, as uint32."""
    return v.to(tl.uint32)


@triton.jit
def high_half(v):
    """The high 32 bits of 64, as uint32."""
    return (v.to(tl.uint64) >> 32).to(tl.uint32)


@triton.jit
def words(group_low, group_high, row_low, row_high, key):
    """Four random words (uint32) for each counter: the number of a group of four columns, and a row id."""
    c0, c1, c2, c3 = group_low, group_high, row_low, row_high
    k0, k1 = low_half(key), high_half(key)
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * MULTIPLIER_0
        p1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def in_columns(v0, v1, v2, v3):
    """Four tensors [rows, groups] as one of [rows, 4 * groups]: the columns of a group side by side."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def negative_two_log(word):
    """`-2 ln((word + 1/2) / 2^32)`, as in rng.py."""
    f = word.to(tl.float32) + 0.5
    shifted = bits(f) - (SQRT_HALF_BITS + (32 << 23))
    exponent = (shifted >> 23).to(tl.float32)
    x = real((shifted & MANTISSA) + SQRT_HALF_BITS) - 1.0
    p = x * 0.2858414053916931 + -0.4411187171936035
    p = p * x + 0.508065402507782
    p = p * x + -0.6651604771614075
    p = p * x + 0.9998043775558472
    p = p * x + -2.000009059906006
    return p * x + exponent * -1.3862943649291992


@triton.jit
def normals(word0, word1):
    """Two standard normal numbers from two words by the Box-Muller transform, as in rng.py."""
    r = tl.sqrt_rn(negative_two_log(word0))
    x = (word1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_STEP
    z = x * x
    s = ((z * 0.008151635527610779 + -0.16662479937076569) * z + 0.9999985694885254) * x
    c = ((z * -0.0013591853203251958 + 0.041655778884887695) * z + -0.4999988377094269) * z + 1.0
    c = real(bits(c) ^ ((word1 << 1) & 0x80000000).to(tl.int32, bitcast=True))
    exchange = (word1 & 0x80000000) != 0
    return r * tl.where(exchange, s, c), r * tl.where(exchange, c, s)
