"""Quantize-dequantize of blocks in plain torch: the reference for the compiled path, and the path on other devices.

One routine serves all block formats. It cuts a matrix [rows, columns] into blocks [rows, blocks, n] and derives the
scale of each block from its largest magnitude (amax). Then it divides each element by the scale, rounds the quotient
to the grid, and multiplies by the scale again. The rounding of v to M mantissa bits, ties to even, is

    (v + C) - C      with  C = 1.5 * 2^(e - M + 23),  e = max(exponent of v, emin)

because the sum lies in [C/1.5, 4C/3], where the spacing of float32 is 2^(e - M). All exponents are read from bits.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .formats import E4M3, Element, Format
from .rng import Key, word_rows

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF
_CHUNK = 1 << 18  # elements processed at a time, so that temporaries stay in the cache


def round_to_grid(v: Float[Tensor, "*shape"], element: Element) -> Float[Tensor, "*shape"]:
    """Round the float32 tensor `v`, which is overwritten, to the nearest grid number with ties to even.

    Values beyond the grid saturate, and zeros keep their signs.
    """
    v.clamp_(element.low, element.high)
    if element.is_integer:
        return v.round_()
    rounder_bits = v.view(torch.int32).bitwise_and(_EXPONENT)
    rounder_bits.clamp_(min=(element.emin + 127) << 23).add_(((23 - element.mantissa_bits) << 23) | 0x400000)
    rounder = rounder_bits.view(torch.float32)
    return (v + rounder).sub_(rounder).copysign_(v)


def round_stochastic(
    v: Float[Tensor, "*shape"], element: Element, words: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Round `v` to one of its two grid neighbours, to each with the probability that leaves the mean unchanged.

    The probability is a multiple of 2^-24; `words` holds 32 random bits for each element. Values beyond the grid
    saturate.
    """
    v = v.clamp(element.low, element.high)
    magnitude = v.abs()
    if element.is_integer:
        step = torch.ones_like(v)
    else:
        exponent = magnitude.view(torch.int32).bitwise_and(_EXPONENT).clamp_(min=(element.emin + 127) << 23)
        step = (exponent - (element.mantissa_bits << 23)).view(torch.float32)
    quotient = magnitude / step  # exact: step is a power of two
    lower = quotient.floor()
    threshold = (words >> 8).to(torch.float32) * 2.0**-24
    up = (threshold < quotient - lower).to(torch.float32)
    return ((lower + up) * step).copysign_(v)


def power_of_two_scale(amax: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """MX block scales 2^k (float32) by the format's rule, for finite block maxima; k is clamped to [-127, 127]."""
    assert fmt.element is not None
    if fmt.rule == "rceil":
        amax = amax / fmt.divisor
    bits = amax.view(torch.int32)
    if fmt.rule == "even":
        bits = bits + (1 << (22 - fmt.element.mantissa_bits))
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
        scale = amax.nan_to_num(0.0, 0.0, 0.0) / fmt.divisor
        if tensor_scale is not None:
            # A tensor scale that underflowed to 0 makes every element zero.
            scale = torch.where(tensor_scale == 0, 0.0, scale / tensor_scale)
        scale = round_to_grid(scale, E4M3)
        if tensor_scale is not None:
            scale = scale * tensor_scale
    else:
        scale = amax / fmt.divisor
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


def _chunk(x: Tensor, fmt: Format, scales: Tensor | None, words: Tensor | None) -> Tensor:
    """Quantize-dequantize float32 `x` [rows, columns] under tensor scales [rows, 1], with random words like `x`."""
    assert fmt.element is not None
    rows, columns = x.shape
    if fmt.scale == "none":
        q = _elements(x, torch.ones_like(x[:1, :1]) if scales is None else scales, fmt.element, words)
        return q.masked_fill_(~x.isfinite(), math.nan)
    size = fmt.block or columns
    padding = -columns % size
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
        words = None if words is None else torch.nn.functional.pad(words, (0, padding))
    blocks = x.reshape(rows, -1, size)
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = _block_scale(amax, fmt, None if scales is None else scales.unsqueeze(-1))
    q = _elements(blocks, scale, fmt.element, None if words is None else words.reshape(rows, -1, size))
    return q.reshape(rows, -1)[:, :columns]


def quantize_rows(
    x: Float[Tensor, "rows columns"],
    fmt: Format,
    scales: Float[Tensor, "#rows 1"] | None,
    out: Float[Tensor, "rows columns"],
    stochastic: Key | None,
) -> None:
    """Quantize-dequantize the rows of `x` and write the result to `out`.

    Args:
        x: the rows, float32 or bfloat16, with blocks along the columns.
        fmt: the format; not a plain cast.
        scales: tensor scales, one for all rows or one for each row; None if the format has none.
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
    """Tensor scales (float32): the largest finite magnitude of each row, or of all of `x`, over `tensor_divisor`."""
    assert fmt.tensor_divisor is not None
    if not per_row:
        amax = finite_amax(x).reshape(1, 1)
    elif x.shape[1] == 0:
        amax = torch.zeros(x.shape[0], 1, dtype=torch.float32, device=x.device)
    else:
        amax = x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    return amax / fmt.tensor_divisor
