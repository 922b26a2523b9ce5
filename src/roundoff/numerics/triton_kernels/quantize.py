"""Kernels of quantize-dequantize, and of the maxima that scales of rows and tensors are made of.

Each works on tiles in registers: `quantize_blocks` on blocks, whose scales depend on nothing else; `quantize_rows` on
whole rows; `quantize_elements` under scales that are known. `launch.py` chooses. The tensor scale comes from

    SOURCE  0 nowhere           1 `scales[0]`, the tensor's amax   2 the row
            3 `scalar`, given   4 `scales[row]`, given             5 `scales[0]`, given
            6 `scales[row]`, the row's amax
"""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels import layout
from roundoff.numerics.triton_kernels.blocks import (
    FLOAT32,
    divided,
    finite_magnitudes,
    quantized_blocks,
    scale_of_maximum,
    tensor_scale_of,
    under_known_scale,
)
from roundoff.numerics.triton_kernels.nvfp4 import second_is_better
from roundoff.numerics.triton_kernels.philox import in_columns, words
from roundoff.numerics.triton_kernels.rounding import EXPONENT, MAGNITUDE, bits, narrowed, not_a_number, real, widened

NONE, TE = tl.constexpr(layout.NONE), tl.constexpr(layout.TE)


@triton.jit
def words_of(row, group, key):
    """Random words [rows, 4 * groups] (uint32) of these rows [rows, 1] and groups of four columns [rows, groups]."""
    zero = (group * 0).to(tl.uint32)
    w0, w1, w2, w3 = words(group.to(tl.uint32), zero, (group * 0 + row).to(tl.uint32), zero, key)
    return in_columns(w0, w1, w2, w3)


@triton.jit(do_not_specialize=["blocks", "rows", "down", "key"])
def quantize_blocks(
    x,
    y,
    scales,
    scalar: tl.float32,
    key: tl.uint64,
    rows,
    columns,
    down,
    across,
    blocks,
    LAYOUT: tl.constexpr,
    SOURCE: tl.constexpr,
    RANDOM: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize `TILE` consecutive blocks of matrices [rows, columns], each cut into blocks [down, across].

    `WHOLE` says that blocks have one row and that no row ends with a part of one.
    """
    HEIGHT: tl.constexpr = LAYOUT.rows
    WIDTH: tl.constexpr = LAYOUT.columns
    N: tl.constexpr = HEIGHT * WIDTH
    first = tl.program_id(0) * TILE
    block = first + tl.arange(0, TILE)
    inside = block < blocks
    band, column = block // across, (block % across) * WIDTH
    row = (band % down) * HEIGHT  # in its matrix
    corner = ((band // down).to(tl.int64) * rows + row) * columns + column
    lane = tl.arange(0, N)[None, :]
    if WHOLE:
        # One address and small offsets, so that the compiler sees accesses of 16 bytes.
        start = first.to(tl.int64) * N
        at = tl.arange(0, TILE)[:, None] * N + lane
        here = inside[:, None]
    else:
        start = first.to(tl.int64) * 0
        at = corner[:, None] + ((lane // WIDTH) * columns + lane % WIDTH)
        here = inside[:, None] & (column[:, None] + lane % WIDTH < columns) & (row[:, None] + lane // WIDTH < rows)
    v = widened(tl.load(x + start + at, mask=here, other=0.0))
    amax_bits = tl.max(bits(v) & MAGNITUDE, 1)
    tensor_scale = tensor_scale_of(scales, scalar, band, inside, LAYOUT, SOURCE)
    takes_second = inside
    if LAYOUT.rule > TE:
        takes_second = second_is_better(
            x, corner, tl.where(inside, rows - row, 0), columns - column, columns, amax_bits, tensor_scale, LAYOUT
        )
    elif LAYOUT.rule == TE:
        takes_second = inside & False
    drawn = bits(v)
    if RANDOM:
        group = (column // 4)[:, None] + tl.arange(0, N // 4)[None, :]
        if HEIGHT > 1:
            group, band = group * 0 + tl.arange(0, N // 4)[None, :], block
        drawn = words_of(band[:, None], group, key)
    q = quantized_blocks(v, drawn, amax_bits, tensor_scale, takes_second, LAYOUT, RANDOM, INTERPRETED)
    tl.store(y + start + at, narrowed(q, y.dtype.element_ty, INTERPRETED), mask=here)


@triton.jit
def outside_of_deadzone(v, deadzone, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rows with 0 in place of numbers below `deadzone` times the row's largest magnitude, in the dtype of storage."""
    amax = real(tl.max(bits(v) & MAGNITUDE, 1))
    threshold = widened(narrowed(amax * deadzone, DTYPE, INTERPRETED))[:, None]
    return tl.where(real(bits(v) & MAGNITUDE) < threshold, 0.0, v)


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
    N: tl.constexpr = LAYOUT.columns if LAYOUT.columns else WIDTH
    BLOCKS: tl.constexpr = WIDTH // N
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
    tensor_scale = tl.full((ROWS,), 1.0, tl.float32)
    if LAYOUT.tensor_divisor != 0:
        tensor_scale = scale_of_maximum(real(tl.max(finite_magnitudes(v), 1)), LAYOUT)
    if LAYOUT.scale == NONE:
        q = under_known_scale(v, drawn, tensor_scale[:, None], LAYOUT, RANDOM)
    else:
        blocks = tl.reshape(v, (ROWS * BLOCKS, N))
        amax_bits = tl.max(bits(blocks) & MAGNITUDE, 1)
        of_block = tl.reshape(tl.broadcast_to(tensor_scale[:, None], (ROWS, BLOCKS)), (ROWS * BLOCKS,))
        drawn = tl.reshape(drawn, (ROWS * BLOCKS, N))
        takes_second = amax_bits < 0
        q = quantized_blocks(blocks, drawn, amax_bits, of_block, takes_second, LAYOUT, RANDOM, INTERPRETED)
        q = tl.reshape(q, (ROWS, WIDTH))
    tl.store(y + at, narrowed(q, y.dtype.element_ty, INTERPRETED), mask=here)


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
    """The largest finite magnitude of a row of any length; under `float32` the scale of the row."""
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
    largest = tl.zeros((1,), tl.int32) + tl.max(amax, 0)
    scale = real(largest)
    if LAYOUT.scale == FLOAT32:
        scale = tl.where(largest < EXPONENT, divided(scale, LAYOUT.divisor), not_a_number(scale))
    tl.store(scales + row + tl.arange(0, 1), scale)
