"""Quantize-dequantize of blocks in plain torch: the reference for the compiled path, and the path on other devices.

One routine serves all block formats. It cuts a matrix [rows, columns] into blocks [rows, blocks, n] and derives the
scale of each block from its largest magnitude (amax). Then it divides each element by the scale, rounds the quotient
to the grid (`grid`), and multiplies by the scale again. Blocks of several rows are first laid out as rows of their
own. HiF8 and HiF4 (`hifloat`), and NVFP4 as Transformer Engine computes it (`nvfp4`), have arithmetic of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from roundoff.formats.element import E4M3, Element
from roundoff.formats.table import Format

from .grid import divided, round_stochastic, round_to_grid
from .hifloat import e6m2_scale, hif4, hif8
from .nvfp4 import encoding_scale, transformer_engine
from .rng import Key, word_rows

_MANTISSA = 0x007FFFFF
_CHUNK = 1 << 18  # elements processed at a time, so that temporaries stay in the cache
_LARGEST = torch.finfo(torch.float32).max
NONE, FROM_TENSOR, FROM_ROW, GIVEN, GIVEN_ROWS = range(5)
"""Origins of the tensor scales: the enum `Source` of kernels/roundoff.cpp."""


def power_of_two_scale(amax: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """MX block scales 2^k (float32) by the format's rule, for finite block maxima; k is clamped to [-127, 127]."""
    assert fmt.element is not None
    if fmt.rule == "rceil":
        amax = divided(amax, fmt.divisor)
    bits = amax.view(torch.int32)
    if fmt.rule == "even":
        bits = bits + (1 << (22 - fmt.element.bits_below_first))
    exponent = bits >> 23  # biased; 0 for subnormal maxima, whose scale every rule except rceil clamps to 2^-127
    if fmt.rule == "ceil":
        exponent = exponent + ((bits & _MANTISSA) != 0)
    elif fmt.rule == "rceil":
        # A subnormal quotient is above 2^-127 if and only if its bits as an integer exceed 2^22.
        exponent = exponent + torch.where(bits < 0x800000, bits > 0x400000, (bits & _MANTISSA) != 0)
    if fmt.rule != "rceil":
        exponent = exponent - fmt.element.emax
    exponent = exponent.clamp(0, 254)
    return torch.where(exponent == 0, 0x400000, exponent << 23).to(torch.int32).view(torch.float32)


def _block_scale(amax: Tensor, fmt: Format, tensor_scale: Tensor | None) -> Tensor:
    """Effective float32 scale of each block: NaN where amax is not finite, 0 where the whole block becomes zero."""
    if fmt.scale == "e8m0":
        scale = power_of_two_scale(amax.nan_to_num(0.0, 0.0, 0.0), fmt)
    elif fmt.scale == "e4m3":
        scale = divided(amax.nan_to_num(0.0, 0.0, 0.0), fmt.divisor)
        if tensor_scale is not None:
            # A tensor scale that underflowed to 0 makes every element zero.
            scale = torch.where(tensor_scale == 0, 0.0, scale / tensor_scale)
        scale = round_to_grid(scale, E4M3)
        if tensor_scale is not None:
            scale = scale * tensor_scale
    else:
        scale = divided(amax, fmt.divisor)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _elements(x: Tensor, scale: Tensor, element: Element, words: Tensor | None) -> Tensor:
    """`x` [rows, blocks, n] divided by `scale` [rows, blocks, 1], rounded, and multiplied by `scale`.

    A scale of 0 gives signed zeros.
    """
    quotient = x / torch.where(scale == 0, 1.0, scale)
    rounded = round_to_grid(quotient, element) if words is None else round_stochastic(quotient, element, words)
    return rounded.mul_(scale)


def finite_amax(x: Float[Tensor, " ..."]) -> Float[Tensor, ""]:
    """Largest finite magnitude of a tensor, as float32; 0 for an empty tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    if torch.compiler.is_compiling() or not x.is_cpu:  # a branch on data would break the graph or wait for the device
        return x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax()
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(x))
    amax = torch.maximum(low.abs(), high.abs())
    if bool(amax.isfinite()):
        return amax
    return x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax()


def _blocks_of(x: Tensor, size: int) -> Tensor:
    """The rows of `x` [rows, columns], padded with zeros, as blocks [rows, blocks, size]."""
    padding = -x.shape[1] % size
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
    return x.reshape(x.shape[0], -1, size)


def _block_size(fmt: Format, columns: int) -> int:
    """Number of elements of a block in rows of this length: a longer block is not padded, except for HiF4's groups."""
    if fmt.block is None:
        return columns
    return fmt.block if fmt.scale == "e6m2" else min(fmt.block, columns)


def _chunk(x: Tensor, fmt: Format, scales: Tensor | None, words: Tensor | None) -> Tensor:
    """Quantize-dequantize float32 `x` [rows, columns] under tensor scales [rows, 1], with random words like `x`."""
    assert fmt.element is not None
    rows, columns = x.shape
    if fmt.element.tapered:
        return hif8(x, words)
    if fmt.scale == "none":
        q = _elements(x, torch.ones_like(x[:1, :1]) if scales is None else scales, fmt.element, words)
        return q.masked_fill_(~x.isfinite(), math.nan)
    size = _block_size(fmt, columns)
    blocks = _blocks_of(x, size)
    words = None if words is None else _blocks_of(words, size)
    scales = None if scales is None else scales.unsqueeze(-1)
    if fmt.scale == "e6m2":
        q = hif4(blocks, words)
    elif fmt.follows_transformer_engine:
        q, _ = transformer_engine(blocks, fmt, scales, words)
    else:
        scale = _block_scale(blocks.abs().amax(-1, keepdim=True), fmt, scales)
        q = _elements(blocks, scale, fmt.element, words)
    return q.reshape(rows, -1)[:, :columns]


def saturated(x: Float[Tensor, "rows columns"], fmt: Format) -> Bool[Tensor, "rows columns"]:
    """Which elements of the finite `x` (float32) are beyond the largest number that their block can hold.

    The scale of the whole tensor, where the format has one, is taken from each row, as activations have it.
    """
    assert fmt.element is not None
    rows, columns = x.shape
    if fmt.element.tapered:
        return hif8(x, None).isinf()
    blocks = _blocks_of(x, _block_size(fmt, columns))
    amax = blocks.abs().amax(-1, keepdim=True)
    scales = None if fmt.tensor_divisor is None else tensor_scales(x, fmt, per_row=True).unsqueeze(-1)
    if fmt.scale == "none":
        assert scales is not None
        scale = scales
    elif fmt.scale == "e6m2":
        scale = e6m2_scale(amax) * 4.0  # under both micro-exponents
    elif fmt.follows_transformer_engine:
        _, scale = transformer_engine(blocks, fmt, scales, None)
    else:
        scale = _block_scale(amax, fmt, scales)
    limit = fmt.element.high * scale * (1 + 1e-6)  # a float32 scale is rounded, and amax itself must not count
    over = (blocks > limit) | (-blocks > limit * (-fmt.element.low / fmt.element.high))
    return over.reshape(rows, -1)[:, :columns]


def tiles_of(x: Shaped[Tensor, "*stack rows columns"], fmt: Format) -> Shaped[Tensor, "tiles elements"]:
    """The two-dimensional blocks of each matrix, padded with zeros, as rows in row-major order."""
    assert fmt.block is not None
    height, width = fmt.rows, fmt.block
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
    *stack, rows, columns = x.shape
    x = x.reshape(*stack, rows // height, height, columns // width, width)
    return x.transpose(-3, -2).reshape(-1, height * width)


def matrices_of(
    tiles: Shaped[Tensor, "tiles elements"], fmt: Format, shape: torch.Size
) -> Shaped[Tensor, "*stack rows columns"]:
    """The matrices of this shape [..., rows, columns] whose blocks `tiles_of` laid out; the padding is cut off."""
    assert fmt.block is not None
    *stack, rows, columns = shape
    down, across = -(-rows // fmt.rows), -(-columns // fmt.block)
    x = tiles.reshape(*stack, down, across, fmt.rows, fmt.block).transpose(-3, -2)
    return x.reshape(*stack, down * fmt.rows, across * fmt.block)[..., :rows, :columns]


@functools.cache
def one_row_a_block(fmt: Format) -> Format:
    """The format of the rows of `tiles_of`: each is one block."""
    assert fmt.block is not None
    return dataclasses.replace(fmt, block=fmt.rows * fmt.block, rows=1)


def quantize_rows(
    x: Float[Tensor, "rows columns"],
    fmt: Format,
    scales: Float[Tensor, "#rows 1"] | None,
    out: Float[Tensor, "rows columns"],
    stochastic: Key | None,
) -> None:
    """Quantize-dequantize the rows of `x` and write the result to `out`.

    Args:
        x: the rows, float32, bfloat16 or float16, with blocks along the columns.
        fmt: the format; not a plain cast, and with blocks of one row.
        scales: tensor scales (as `tensor_scales` gives them), one for all rows or one for each row; None if the format
            has none.
        out: where to write.
        stochastic: key of the random bits for stochastic rounding; None rounds to nearest.
    """
    rows, columns = x.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = x[start : start + step]
        words = None
        if stochastic is not None:
            ids = torch.arange(start, start + part.shape[0], device=x.device)
            words = word_rows(stochastic, ids, torch.zeros_like(ids), columns)
        cut = scales if scales is None or scales.shape[0] == 1 else scales[start : start + step]
        out[start : start + step] = _chunk(part.to(torch.float32), fmt, cut, words)


def tensor_scales(x: Float[Tensor, "rows columns"], fmt: Format, per_row: bool) -> Float[Tensor, "#rows 1"]:
    """Tensor scales (float32), from the largest finite magnitude of each row, or of all of `x`.

    It is that magnitude over `tensor_divisor`; where the format follows Transformer Engine, its encoding scale.
    """
    assert fmt.tensor_divisor is not None
    if not per_row:
        amax = finite_amax(x).reshape(1, 1)
    elif x.shape[1] == 0:
        amax = torch.zeros(x.shape[0], 1, dtype=torch.float32, device=x.device)
    else:
        amax = x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    if fmt.follows_transformer_engine:
        return encoding_scale(amax, fmt.tensor_divisor)
    return divided(amax, fmt.tensor_divisor)


def row_scales(
    rows: Float[Tensor, "rows columns"], fmt: Format, source: int, scales: float | Float[Tensor, " #rows"]
) -> Float[Tensor, "#rows 1"] | None:
    """Tensor scales, as `quantize_rows` takes them, from one of the origins above; None if the format has none."""
    if source == NONE:
        return None
    if isinstance(scales, Tensor) or source == GIVEN:
        if not isinstance(scales, Tensor):
            scales = torch.full((1, 1), scales, dtype=torch.float32, device=rows.device)
        scales = scales.reshape(-1, 1)
        return (1.0 / scales).clamp(max=_LARGEST) if fmt.follows_transformer_engine else scales
    return tensor_scales(rows, fmt, per_row=source == FROM_ROW)


def quantize_matrices(
    x: Float[Tensor, "*shape"],
    fmt: Format,
    source: int,
    scales: float | Float[Tensor, " #rows"],
    stochastic: Key | None,
) -> Float[Tensor, "*shape"]:
    """Quantize-dequantize a tensor with blocks along the last axis, and along the one before it if they span rows.

    Args:
        x: the numbers, with at least one axis.
        fmt: the format; not a plain cast.
        source: origin of the tensor scales, one of those above.
        scales: those that were given.
        stochastic: key of the random bits for stochastic rounding; None rounds to nearest.
    """
    columns = x.shape[-1]
    flat = x.reshape(x.numel() // columns if columns else 0, columns)
    scale = row_scales(flat, fmt, source, scales)
    if fmt.rows == 1:
        rows = torch.empty_like(flat, memory_format=torch.contiguous_format)
        quantize_rows(flat, fmt, scale, rows, stochastic)
        return rows.reshape(x.shape)
    # Each block is laid out as a row of its own.
    tiles = tiles_of(x if x.dim() > 1 else flat, fmt)
    rows = torch.empty_like(tiles)
    quantize_rows(tiles, one_row_a_block(fmt), scale, rows, stochastic)
    return matrices_of(rows, fmt, x.shape if x.dim() > 1 else flat.shape).reshape(x.shape)
