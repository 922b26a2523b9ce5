"""Kernels of quantize-dequantize, and of the maxima that scales of rows and tensors are made of.

Each works on tiles in registers: `quantize_blocks` on blocks, whose scales depend on nothing else; `quantize_rows` on
whole rows; `quantize_elements` under scales that are known. `launch.py` chooses. The tensor scale comes from

    SOURCE  0 nowhere   1 `scales[0]`, the tensor's amax   2 the row   3 the number `scalar`   4 `scales[row]`
"""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels import layout
from roundoff.numerics.triton_kernels.philox import in_columns, words
from roundoff.numerics.triton_kernels.rounding import (
    EXPONENT,
    MAGNITUDE,
    QUIET_NAN,
    bits,
    narrowed,
    quantized,
    real,
    rounded_to_grid,
    scales_of,
    widened,
)

NONE, FLOAT32 = tl.constexpr(layout.NONE), tl.constexpr(layout.FLOAT32)
FROM_TENSOR, GIVEN, GIVEN_ROWS = tl.constexpr(1), tl.constexpr(3), tl.constexpr(4)


@triton.jit
def tensor_scale_of(scales, scalar, row, inside, LAYOUT: tl.constexpr, SOURCE: tl.constexpr):
    """The tensor scale that applies to each of these rows."""
    if SOURCE == FROM_TENSOR:
        amax = tl.full(row.shape, 0.0, tl.float32) + tl.load(scales)
        scale = tl.div_rn(amax, tl.full(row.shape, LAYOUT.tensor_divisor, tl.float32))
    elif SOURCE == GIVEN:
        scale = tl.full(row.shape, 0.0, tl.float32) + scalar
    elif SOURCE == GIVEN_ROWS:
        scale = tl.load(scales + row, mask=inside, other=1.0)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
    return scale


@triton.jit
def words_of(row, group, key):
    """Random words [rows, 4 * groups] (uint32) of these rows [rows, 1] and groups of four columns [rows, groups]."""
    zero = tl.zeros(group.shape, tl.uint32)
    low = tl.zeros(group.shape, tl.uint32) + row.to(tl.uint32)
    w0, w1, w2, w3 = words(group.to(tl.uint32), zero, low, zero, key)
    return in_columns(w0, w1, w2, w3)


@triton.jit(do_not_specialize=["blocks", "key"])
def quantize_blocks(
    x,
    y,
    scales,
    scalar: tl.float32,
    key: tl.uint64,
    columns,
    per_row,
    blocks,
    LAYOUT: tl.constexpr,
    SOURCE: tl.constexpr,
    RANDOM: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize `TILE` consecutive blocks; a row has `per_row` of them, the last one whole if `WHOLE`."""
    N: tl.constexpr = LAYOUT.block
    first = tl.program_id(0) * TILE
    block = first + tl.arange(0, TILE)
    inside = block < blocks
    row = block // per_row
    tensor_scale = tensor_scale_of(scales, scalar, row, inside, LAYOUT, SOURCE)
    lane = tl.arange(0, N)[None, :]
    if WHOLE:
        # One address and small offsets, so that the compiler sees accesses of 16 bytes.
        start = first.to(tl.int64) * N
        at = tl.arange(0, TILE)[:, None] * N + lane
        here = inside[:, None]
    else:
        start = first.to(tl.int64) * 0
        column = (block % per_row)[:, None] * N + lane
        at = row[:, None].to(tl.int64) * columns + column
        here = inside[:, None] & (column < columns)
    v = widened(tl.load(x + start + at, mask=here, other=0.0))
    multiply, divide = scales_of(tl.max(bits(v) & MAGNITUDE, 1), tensor_scale, LAYOUT)
    drawn = bits(v)
    if RANDOM:
        group = (block % per_row)[:, None] * (N // 4) + tl.arange(0, N // 4)[None, :]
        drawn = words_of(row[:, None], group, key)
    q = quantized(v, drawn, multiply[:, None], divide[:, None], LAYOUT, RANDOM)
    tl.store(y + start + at, narrowed(q, y.dtype.element_ty, INTERPRETED), mask=here)


@triton.jit(do_not_specialize=["rows", "key"])
def quantize_rows(
    x,
    y,
    key: tl.uint64,
    deadzone: tl.float32,
    rows,
    columns,
    LAYOUT: tl.constexpr,
    RANDOM: tl.constexpr,
    DEADZONE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize `ROWS` whole rows of at most `WIDTH` columns, each under a scale of its own."""
    N: tl.constexpr = LAYOUT.block if LAYOUT.block else WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    here = (row < rows)[:, None] & (column < columns)
    at = row[:, None].to(tl.int64) * columns + column
    v = widened(tl.load(x + at, mask=here, other=0.0))
    if DEADZONE:
        v = outside_of_deadzone(v, deadzone, x.dtype.element_ty, INTERPRETED)
    drawn = bits(v)
    if RANDOM:
        group = tl.zeros((ROWS, WIDTH // 4), tl.int32) + tl.arange(0, WIDTH // 4)[None, :]
        drawn = words_of(row[:, None], group, key)
    if LAYOUT.tensor_divisor != 0:
        amax = real(tl.max(finite_magnitudes(v), 1))
        tensor_scale = tl.div_rn(amax, tl.full(amax.shape, LAYOUT.tensor_divisor, tl.float32))
    else:
        tensor_scale = tl.full((ROWS,), 1.0, tl.float32)
    if LAYOUT.scale == NONE:
        q = under_known_scale(v, drawn, tensor_scale[:, None], LAYOUT, RANDOM)
    else:
        blocks = tl.reshape(v, (ROWS, WIDTH // N, N))
        amax_bits = tl.max(bits(blocks) & MAGNITUDE, 2)
        multiply, divide = scales_of(amax_bits, tl.broadcast_to(tensor_scale[:, None], amax_bits.shape), LAYOUT)
        drawn = tl.reshape(drawn, (ROWS, WIDTH // N, N))
        q = quantized(blocks, drawn, multiply[:, :, None], divide[:, :, None], LAYOUT, RANDOM)
        q = tl.reshape(q, (ROWS, WIDTH))
    tl.store(y + at, narrowed(q, y.dtype.element_ty, INTERPRETED), mask=here)


@triton.jit
def finite_magnitudes(v):
    """The bits of magnitudes, 0 for numbers that are not finite."""
    magnitude = bits(v) & MAGNITUDE
    return tl.where(magnitude < EXPONENT, magnitude, 0)


@triton.jit
def outside_of_deadzone(v, deadzone, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rows with 0 in place of numbers below `deadzone` times the row's largest magnitude, in the dtype of storage."""
    amax = real(tl.max(bits(v) & MAGNITUDE, 1))
    threshold = widened(narrowed(amax * deadzone, DTYPE, INTERPRETED))[:, None]
    return tl.where(real(bits(v) & MAGNITUDE) < threshold, 0.0, v)


@triton.jit
def under_known_scale(v, words, scale, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Elements under a scale [rows, 1] that is known; numbers that are not finite become NaN."""
    q = tl.div_rn(v, tl.broadcast_to(tl.where(scale == 0, 1.0, scale), v.shape))
    q = rounded_to_grid(q, words, LAYOUT, RANDOM) * scale
    return tl.where((bits(v) & MAGNITUDE) < EXPONENT, q, real(tl.full(v.shape, QUIET_NAN, tl.int32)))


@triton.jit(do_not_specialize=["rows", "key"])
def quantize_elements(
    x,
    y,
    scales,
    scalar: tl.float32,
    key: tl.uint64,
    rows,
    columns,
    LAYOUT: tl.constexpr,
    SOURCE: tl.constexpr,
    RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize a tile [ROWS, WIDTH] under scales that are known."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = row < rows
    scale = tensor_scale_of(scales, scalar, row, inside, LAYOUT, SOURCE)
    here = inside[:, None] & (column < columns)
    at = row[:, None].to(tl.int64) * columns + column
    v = widened(tl.load(x + at, mask=here, other=0.0))
    drawn = bits(v)
    if RANDOM:
        first = tl.program_id(1) * (WIDTH // 4)
        group = tl.zeros((ROWS, WIDTH // 4), tl.int32) + (first + tl.arange(0, WIDTH // 4))[None, :]
        drawn = words_of(row[:, None], group, key)
    q = under_known_scale(v, drawn, scale[:, None], LAYOUT, RANDOM)
    tl.store(y + at, narrowed(q, y.dtype.element_ty, INTERPRETED), mask=here)


@triton.jit
def tensor_amax(x, amax, count, TILE: tl.constexpr):
    """Raise `amax[0]` (the bits of a float32, as int32) to the largest finite magnitude of a tile."""
    start = tl.program_id(0).to(tl.int64) * TILE
    offset = tl.arange(0, TILE)
    v = widened(tl.load(x + start + offset, mask=start + offset < count, other=0.0))
    # Bits of numbers that are not negative are in the order of the numbers.
    tl.atomic_max(amax, tl.max(finite_magnitudes(v), 0))


@triton.jit
def row_scales(x, scales, columns, LAYOUT: tl.constexpr, WIDTH: tl.constexpr):
    """The scale of one long row: a tensor scale of its finite numbers, or that of a row under `float32`."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, WIDTH)
    amax = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, columns, WIDTH):
        here = first + offset < columns
        v = widened(tl.load(x + row * columns + first + offset, mask=here, other=0.0))
        if LAYOUT.scale == FLOAT32:
            amax = tl.maximum(amax, bits(v) & MAGNITUDE)
        else:
            amax = tl.maximum(amax, finite_magnitudes(v))
    largest = tl.max(amax, 0)
    if LAYOUT.scale == FLOAT32:
        scale = tl.div_rn(real(largest), tl.full((), LAYOUT.divisor, tl.float32))
        scale = tl.where(largest < EXPONENT, scale, real(tl.full((), QUIET_NAN, tl.int32)))
    else:
        scale = tl.div_rn(real(largest), tl.full((), LAYOUT.tensor_divisor, tl.float32))
    tl.store(scales + row, scale)
