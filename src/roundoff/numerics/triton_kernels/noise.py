"""The kernel of noise on a product, and of draws by themselves, to the bits of `numerics/noise.py` and `rng.py`.

KIND  0 `y + s * |y| * eps`, then the bias   1 standard normal numbers   2 uniform numbers
"""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels.philox import high_half, in_columns, low_half, normals, words
from roundoff.numerics.triton_kernels.rounding import MAGNITUDE, bits, narrowed, real, uniforms, widened

NOISE, NORMAL, UNIFORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["rows", "key"])
def noise(
    y,
    out,
    ids,
    starts,
    bias,
    s: tl.float32,
    key: tl.uint64,
    rows,
    columns,
    KIND: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write a tile of `ROWS` rows and `WIDTH` draws; a row whose first column is no multiple of 4 starts inside it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = tl.program_id(1) * (WIDTH // 4)
    group = tl.zeros((ROWS, WIDTH // 4), tl.int32) + (first + tl.arange(0, WIDTH // 4))[None, :]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row_low, row_high = (group * 0 + row[:, None]).to(tl.uint32), (group * 0).to(tl.uint32)
    if HAS_IDS:
        row_id = tl.zeros(group.shape, tl.int64) + tl.load(ids + row, mask=inside, other=0)[:, None]
        row_low, row_high = low_half(row_id), high_half(row_id)
    group_low, group_high = group.to(tl.uint32), (group * 0).to(tl.uint32)
    if HAS_STARTS:
        start = tl.load(starts + row, mask=inside, other=0)[:, None]
        column = column - (start & 3).to(tl.int32)
        wide = group.to(tl.int64) + (start >> 2)
        group_low, group_high = low_half(wide), high_half(wide)
    here = inside[:, None] & (column >= 0) & (column < columns)
    at = row[:, None].to(tl.int64) * columns + column
    w0, w1, w2, w3 = words(group_low, group_high, row_low, row_high, key)
    if KIND == UNIFORM:
        tl.store(out + at, uniforms(in_columns(w0, w1, w2, w3)), mask=here)
    else:
        n0, n1 = normals(w0, w1)
        n2, n3 = normals(w2, w3)
        eps = in_columns(n0, n1, n2, n3)
        if KIND == NOISE:
            v = widened(tl.load(y + at, mask=here, other=0.0))
            v = v + (real(bits(v) & MAGNITUDE) * s) * eps
            v = narrowed(v, out.dtype.element_ty, INTERPRETED)
            if HAS_BIAS:
                # Rounded twice, as two operations are: the bias is no part of the product.
                b = widened(tl.load(bias + column, mask=here, other=0.0))
                v = narrowed(widened(v) + b, out.dtype.element_ty, INTERPRETED)
            tl.store(out + at, v, mask=here)
        else:
            tl.store(out + at, eps, mask=here)
