"""Launches the kernels: which one does which work, on tiles of which size.

The sizes follow from two rules: a thread holds some 16 elements, so that each of its accesses has 16 bytes and several
are under way; and a row that fits into the registers of a block of threads is read once. They were not tuned on a
device, because none was at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.numerics.blocks import FROM_ROW, FROM_TENSOR, GIVEN_ROWS
from roundoff.numerics.triton_kernels import layout, rounding
from roundoff.numerics.triton_kernels.layout import FROM_MAXIMA, GIVEN_ONE, Layout, holds_rows
from roundoff.numerics.triton_kernels.noise import noise as noise_kernel
from roundoff.numerics.triton_kernels.quantize import (
    quantize_blocks,
    quantize_elements,
    quantize_rows,
    row_scales,
    tensor_amax,
)

TILE = 2048
"""Elements of a tile: 16 for each of the 128 threads of four warps."""
WIDEST = 1024
"""Columns of a tile."""
MOST_BLOCKS = 2**31 - 1
"""Blocks, rows and columns are counted in 32 bits."""
_MASK64 = (1 << 64) - 1


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return not isinstance(rounding.narrowed, triton.JITFunction)


def _options(elements: int, width: int = 0) -> dict[str, Any]:
    """Launch options of a kernel whose tile has this many elements."""
    warps = max(1, min(16, max(elements // 512, width // 1024)))
    return {"INTERPRETED": interpreted(), "num_warps": warps, "enable_fp_fusion": False}


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device of the process, which becomes that of `x`."""
    if x.is_cpu:
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile on rows of this length; a power of two that divides it, where there is one."""
    divisor = columns & -columns
    width = min(divisor, WIDEST) if divisor >= 128 else min(triton.next_power_of_2(columns), WIDEST)
    width = max(4, width)
    return max(1, TILE // width), width


def can_quantize(shape: Sequence[int], form: Layout) -> bool:
    """Whether a tensor of this shape is within the numbers that the kernels count with."""
    rows, columns = sizes(shape)
    return max(rows, columns, rows * triton.cdiv(columns, form.columns or columns or 1)) < MOST_BLOCKS - 2 * TILE


def quantize(
    x: Float[Tensor, "*rows columns"],
    out: Float[Tensor, "*rows columns"],
    form: Layout,
    source: int,
    scales: Float[Tensor, " scales"] | None,
    scalar: float,
    key: int | None,
    deadzone: float = 0.0,
) -> None:
    """Quantize-dequantize the rows of `x` into `out`, both contiguous; `out` may be `x`.

    Args:
        x: the rows, float32, bfloat16 or float16; the last two axes are a matrix, for blocks that span rows.
        out: where to write; the dtype of `x`.
        form: the layout of the format.
        source: origin of the tensor scales.
        scales: those that were given: one, or one for each row.
        scalar: the one that was given as a number.
        key: key of the random bits of stochastic rounding, 64 bits; None rounds to nearest.
        deadzone: numbers below this fraction of the row's largest magnitude count as 0; only where `holds_rows`.
    """
    rows, columns = sizes(x.shape)
    if x.numel() == 0:
        return
    with _on(x):
        if deadzone or (_by_row(form, source) and holds_rows(columns, form)):
            _rows(x, out, form, key, deadzone)
            return
        if _by_row(form, source):
            scales = torch.empty(rows, dtype=torch.float32, device=x.device)
            row_scales[(rows,)](x, scales, columns, LAYOUT=form, WIDTH=4096, num_warps=8, enable_fp_fusion=False)
            source = GIVEN_ROWS if form.scale == layout.FLOAT32 else FROM_MAXIMA
        elif source == FROM_TENSOR:
            scales = torch.zeros(1, dtype=torch.float32, device=x.device)
            count, tile = x.numel(), 4 * TILE
            grid = (triton.cdiv(count, tile),)
            tensor_amax[grid](x, scales.view(torch.int32), count, TILE=tile, num_warps=8, enable_fp_fusion=False)
        elif source == GIVEN_ROWS and scales is not None and scales.numel() == 1:
            source = GIVEN_ONE
        work = _blocks if form.columns else _elements
        work(x, out, form, source, scales, scalar, key)


def _by_row(form: Layout, source: int) -> bool:
    """Whether the scale of an element depends on its whole row."""
    return source == FROM_ROW or bool(form.scale == layout.FLOAT32 and form.columns == 0)


def _rows(x: Tensor, out: Tensor, form: Layout, key: int | None, deadzone: float) -> None:
    rows, columns = sizes(x.shape)
    width = max(4, triton.next_power_of_2(columns), form.columns)
    tall = max(1, TILE // width)
    quantize_rows[(triton.cdiv(rows, tall),)](
        x,
        out,
        0 if key is None else key & _MASK64,
        deadzone,
        rows,
        columns,
        LAYOUT=form,
        RANDOM=key is not None,
        DEADZONE=deadzone > 0,
        ROWS=tall,
        WIDTH=width,
        **_options(tall * width, width),
    )


def _blocks(
    x: Tensor, out: Tensor, form: Layout, source: int, scales: Tensor | None, scalar: float, key: int | None
) -> None:
    count, columns = sizes(x.shape)
    rows = count if form.rows == 1 else int(x.shape[-2]) if x.dim() > 1 else 1
    down, across = triton.cdiv(rows, form.rows), triton.cdiv(columns, form.columns)
    blocks = count // rows * down * across
    size = form.rows * form.columns
    tile = max(1, (TILE if x.dtype is torch.float32 else 2 * TILE) // size)
    quantize_blocks[(triton.cdiv(blocks, tile),)](
        x,
        out,
        x if scales is None else scales,
        scalar,
        0 if key is None else key & _MASK64,
        rows,
        columns,
        down,
        across,
        blocks,
        LAYOUT=form,
        SOURCE=source,
        RANDOM=key is not None,
        WHOLE=form.rows == 1 and columns % form.columns == 0,
        TILE=tile,
        **_options(TILE),
    )


def _elements(
    x: Tensor, out: Tensor, form: Layout, source: int, scales: Tensor | None, scalar: float, key: int | None
) -> None:
    rows, columns = sizes(x.shape)
    tall, width = _tile(columns)
    quantize_elements[(triton.cdiv(rows, tall), triton.cdiv(columns, width))](
        x,
        out,
        x if scales is None else scales,
        scalar,
        0 if key is None else key & _MASK64,
        rows,
        columns,
        LAYOUT=form,
        SOURCE=source,
        RANDOM=key is not None,
        ROWS=tall,
        WIDTH=width,
        **_options(TILE),
    )


def noise(
    y: Float[Tensor, "rows columns"],
    out: Float[Tensor, "rows columns"],
    s: float,
    key: int,
    ids: Int[Tensor, " rows"] | None,
    starts: Int[Tensor, " rows"] | None,
    bias: Float[Tensor, " columns"] | None = None,
) -> None:
    """Write `y + s * |y| * eps`, plus the bias, to `out`; both are contiguous, and `out` may be `y`."""
    _noise(0, y, out, s, key, ids, starts, bias)


def draw(kind: int, out: Float[Tensor, "rows columns"], key: int, ids: Int[Tensor, " rows"]) -> None:
    """Write standard normal (`kind` 1) or uniform (2) numbers, float32, to the contiguous `out`."""
    _noise(kind, out, out, 0.0, key, ids, None, None)


def _noise(
    kind: int,
    y: Tensor,
    out: Tensor,
    s: float,
    key: int,
    ids: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
) -> None:
    rows, columns = out.shape
    if out.numel() == 0:
        return
    tall, width = _tile(columns)
    grid = (triton.cdiv(rows, tall), triton.cdiv(columns + (0 if starts is None else 3), width))
    with _on(out):
        noise_kernel[grid](
            y,
            out,
            y if ids is None else ids,
            y if starts is None else starts,
            y if bias is None else bias,
            s,
            key & _MASK64,
            rows,
            columns,
            KIND=kind,
            HAS_IDS=ids is not None,
            HAS_STARTS=starts is not None,
            HAS_BIAS=bias is not None,
            ROWS=tall,
            WIDTH=width,
            **_options(TILE),
        )


def sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor whose last axis holds the columns; a scalar has one of each."""
    columns = int(shape[-1]) if len(shape) else 1
    rows = 1
    for size in shape[:-1]:
        rows *= int(size)
    return rows, columns
