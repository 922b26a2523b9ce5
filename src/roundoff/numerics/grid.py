"""Rounding to the grid of an element, in plain torch.

The rounding of v to M mantissa bits, ties to even, is

    (v + C) - C      with  C = 1.5 * 2^(e - M + 23),  e = max(exponent of v, emin)

because the sum lies in [C/1.5, 4C/3], where the spacing of float32 is 2^(e - M). All exponents are read from bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.formats.element import Element

from .rng import fractions_of

_EXPONENT = 0x7F800000


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
    up = (fractions_of(words) < quotient - lower).to(torch.float32)
    return ((lower + up) * step).copysign_(v)


def divided(x: Float[Tensor, "*shape"], divisor: float) -> Float[Tensor, "*shape"]:
    """`x / divisor`, correctly rounded: on a GPU, torch multiplies by the reciprocal where the divisor is a number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
