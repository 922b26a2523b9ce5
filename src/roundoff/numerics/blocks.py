"""Quantize-dequantize of blocks in plain torch: the reference of the compiled path, and the path of other devices.

One routine serves all block floats. A matrix [R, K] is cut into blocks [R, B, n]; a block's amax gives its scale; each
element is divided by the scale, rounded on the grid, and multiplied back:

    C = 1.5 * 2^(e - M + 23),  e = max(exponent of v, emin):   (v + C) - C rounds v to M mantissa bits, ties to even

because the sum lies in [C/1.5, 4C/3], where float32's own spacing is 2^(e - M). All exponents come from bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import E4M3, Element, Format
from .rng import Key, word_rows

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF
_CHUNK = 1 << 18  # elements worked on at a time: temporaries stay in the cache


def round_to_grid(v: Tensor, element: Element) -> Tensor:
    """`v` (float32, overwritten) rounded to the nearest grid number, ties to even; saturates; keeps signs of zeros."""
    v.clamp_(element.low, element.high)
    if element.is_integer:
        return v.round_()
    c = v.view(torch.int32).bitwise_and(_EXPONENT)
    c = c.clamp_(min=(element.emin + 127) << 23).add_(((23 - element.mantissa_bits) << 23) | 0x400000)
    rounder = c.view(torch.float32)
    return (v + rounder).sub_(rounder).copysign_(v)


def round_stochastic(v: Tensor, element: Element, words: Tensor) -> Tensor:
    """`v` rounded to one of its two grid neighbours, the upper with the probability of its nearness (to 2^-24)."""
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


def power_of_two_scale(amax: Tensor, fmt: Format) -> Tensor:
    """MX block scales 2^k (float32) of finite block maxima, by the format's rule; k is clamped to [-127, 127]."""
    assert fmt.element is not None
    if fmt.rule == "rceil":
        amax = amax / fmt.divisor
    bits = amax.view(torch.int32)
    if fmt.rule == "even":
        bits = bits + (1 << (22 - fmt.element.mantissa_bits))
    exponent = bits >> 23  # biased; 0 for subnormal numbers, which every rule but rceil clamps away
    if fmt.rule == "ceil":
        exponent = exponent + ((bits & _MANTISSA) != 0)
    elif fmt.rule == "rceil":
        # A subnormal quotient is above 2^-127 exactly if its integer exceeds 2^22.
        exponent = exponent + torch.where(bits < 0x800000, bits > 0x400000, (bits & _MANTISSA) != 0)
    if fmt.rule != "rceil":
        exponent = exponent - fmt.element.emax
    exponent = exponent.clamp(0, 254)
    return torch.where(exponent == 0, 0x400000, exponent << 23).to(torch.int32).view(torch.float32)


def _block_scale(amax: Tensor, fmt: Format, tensor_scale: Tensor | None) -> Tensor:
    """Effective float32 scale of each block: NaN where amax is not finite, 0 where the block quantizes to zeros."""
    if fmt.scale == "e8m0":
        scale = power_of_two_scale(amax.nan_to_num(0.0, 0.0, 0.0), fmt)
    elif fmt.scale == "e4m3":
        scale = amax.nan_to_num(0.0, 0.0, 0.0) / fmt.divisor
        if tensor_scale is not None:
            # A tensor scale that underflowed to 0 belongs to a tensor of zeros.
            scale = torch.where(tensor_scale == 0, 0.0, scale / tensor_scale)
        scale = round_to_grid(scale, E4M3)
        if tensor_scale is not None:
            scale = scale * tensor_scale
    else:
        scale = amax / fmt.divisor
    return torch.where(amax.isfinite(), scale, torch.nan)


def _elements(x: Tensor, scale: Tensor, element: Element, words: Tensor | None) -> Tensor:
    """`x` [R, B, n] divided by `scale` [R, B, 1], rounded, multiplied back; a scale of 0 gives signed zeros."""
    v = x / torch.where(scale == 0, 1.0, scale)
    v = round_to_grid(v, element) if words is None else round_stochastic(v, element, words)
    return v.mul_(scale)


def finite_amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of a tensor as float32 (0 for an empty one)."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    if torch.compiler.is_compiling() or not x.is_cpu:  # no branch on data
        return x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax()
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(x))
    amax = torch.maximum(low.abs(), high.abs())
    if bool(amax.isfinite()):
        return amax
    return x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax()


def _chunk(x: Tensor, fmt: Format, scales: Tensor | None, words: Tensor | None) -> Tensor:
    """Quantize-dequantize of float32 rows [R, K]; `scales` [R, 1] are tensor scales; `words` [R, K] random bits."""
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


def quantize_rows(x: Tensor, fmt: Format, scales: Tensor | None, out: Tensor, stochastic: Key | None) -> None:
    """Write quantize-dequantize of `x` [R, K] (float32 or bfloat16) to `out`; `scales` [R, 1] are tensor scales."""
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


def tensor_scales(x: Tensor, fmt: Format, per_row: bool) -> Tensor:
    """Tensor scales [1, 1] or [R, 1] (float32) of rows [R, K]: the largest finite magnitude over `tensor_divisor`."""
    assert fmt.tensor_divisor is not None
    if not per_row:
        amax = finite_amax(x).reshape(1, 1)
    elif x.shape[1] == 0:
        amax = torch.zeros(x.shape[0], 1, dtype=torch.float32, device=x.device)
    else:
        amax = x.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    return amax / fmt.tensor_divisor
