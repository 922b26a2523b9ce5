"""Device functions: NVFP4 in the order of operations of Transformer Engine, as in `numerics/nvfp4.py`.

Here `encoding` is the tensor's encoding scale g, and a block's maximum is given by its bits. Four over six tries two
scales; the sums of their errors are made one element after the other, as on the other paths, so a thread takes a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from roundoff.numerics.triton_kernels import layout
from roundoff.numerics.triton_kernels.rounding import (
    EXPONENT,
    nearest,
    nearest_float,
    not_a_number,
    real,
    rounded_to_grid,
    widened,
    with_sign,
)

ABSOLUTE = tl.constexpr(layout.ABSOLUTE)
LARGEST = tl.constexpr(3.4028234663852886e38)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def reciprocal(v):
    """`1 / v`, at most the largest finite number."""
    return tl.minimum(tl.div_rn(tl.full(v.shape, 1.0, tl.float32), v), LARGEST)


@triton.jit
def encoding_scale(amax, LAYOUT: tl.constexpr):
    """The encoding scale of a tensor from its largest finite magnitude; 1 if that is 0."""
    g = tl.minimum(tl.div_rn(tl.full(amax.shape, LAYOUT.tensor_divisor, tl.float32), amax), LARGEST)
    return tl.where(amax == 0, 1.0, g)


@triton.jit
def stored_scales(amax_bits, encoding, LAYOUT: tl.constexpr):
    """The scale of each block in E4M3, and the second one that four over six tries."""
    amax = real(tl.where(amax_bits < EXPONENT, amax_bits, 0))
    stored = amax * tl.div_rn(encoding, tl.full(encoding.shape, LAYOUT.divisor, tl.float32))
    return nearest_float(stored, 3, -6, E4M3_MAX), nearest_float(stored * 1.5, 3, -6, E4M3_MAX)


@triton.jit
def transformer_engine(v, words, amax_bits, encoding, takes_second, LAYOUT: tl.constexpr, RANDOM: tl.constexpr):
    """Blocks [blocks, N]; those of which `takes_second` is true are stored under the second scale."""
    finite = (amax_bits < EXPONENT)[:, None]
    first, second = stored_scales(amax_bits, encoding, LAYOUT)
    scale = tl.where(takes_second, second, first)
    decoding = tl.div_rn(tl.full(encoding.shape, 1.0, tl.float32), encoding)
    quotient = tl.where(finite, v, 0.0) * reciprocal(scale * decoding)[:, None]
    q = rounded_to_grid(quotient, words, LAYOUT, RANDOM) * scale[:, None] * decoding[:, None]
    return with_sign(tl.where(finite, q, not_a_number(v)), v)


@triton.jit
def error_of(v, scale, encoding, LAYOUT: tl.constexpr):
    """The squared or absolute error of one element of each block under a stored scale."""
    decoding = tl.div_rn(tl.full(encoding.shape, 1.0, tl.float32), encoding)
    error = tl.div_rn(nearest(v * reciprocal(scale * decoding), LAYOUT) * scale, encoding) - v
    if LAYOUT.rule == ABSOLUTE:
        error = tl.abs(error)
    else:
        error = error * error
    return error


@triton.jit
def second_is_better(x, at, rows_left, columns_left, columns, amax_bits, encoding, LAYOUT: tl.constexpr):
    """Whether the second scale has the smaller error, for blocks that start at the elements `at` of `x`.

    `rows_left` and `columns_left` say how much of the matrix there is from there on; what is beyond counts as 0.
    """
    finite = amax_bits < EXPONENT
    first, second = stored_scales(amax_bits, encoding, LAYOUT)
    error_of_first = tl.zeros(encoding.shape, tl.float32)
    error_of_second = tl.zeros(encoding.shape, tl.float32)
    for i in range(LAYOUT.rows * LAYOUT.columns):
        row, column = i // LAYOUT.columns, i % LAYOUT.columns
        here = finite & (row < rows_left) & (column < columns_left)
        v = widened(tl.load(x + at + (row * columns + column), mask=here, other=0.0))
        error_of_first += error_of(v, first, encoding, LAYOUT)
        error_of_second += error_of(v, second, encoding, LAYOUT)
    return error_of_second < error_of_first
