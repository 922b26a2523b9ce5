"""NVFP4 in the order of operations of Transformer Engine, and four over six (arXiv:2512.02010), in plain torch.

With amax the tensor's largest finite magnitude and a that of a block, Transformer Engine computes in float32

    g = 448 * 6 / amax                the tensor's encoding scale; 1 if amax is 0
    s = e4m3(a * (g / 6))             the block's stored scale
    q = e2m1(x * (1 / (s * (1 / g)))) the stored element
    x' = (q * s) * (1 / g)            the number read back

where `nvfp4` divides x by `s * (amax / 2688)`. Both agree in every code, but the products differ in their last bits.
Four over six takes 256 for 448 and tries a second scale, e4m3(a * (g / 6) * 1.5), under which the block's largest
number becomes 4 instead of 6. The scale with the smaller error is kept, and the first one if both are equal.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.formats.element import E4M3
from roundoff.formats.table import Format
from roundoff.numerics.grid import round_stochastic, round_to_grid

_LARGEST = torch.finfo(torch.float32).max
_SECOND_CANDIDATE = 1.5  # 6 / 4


def encoding_scale(amax: Float[Tensor, "*shape"], divisor: float) -> Float[Tensor, "*shape"]:
    """The encoding scale of a tensor (float32) from its largest finite magnitude; 1 if that is 0."""
    quotient = torch.full_like(amax, divisor) / amax  # torch takes `number / tensor` as a product with the reciprocal
    return torch.where(amax == 0, 1.0, quotient.clamp(max=_LARGEST))


def transformer_engine(
    blocks: Float[Tensor, "rows blocks size"],
    fmt: Format,
    encoding: Float[Tensor, "#rows 1 1"] | None,
    words: Int[Tensor, "rows blocks size"] | None,
) -> tuple[Float[Tensor, "rows blocks size"], Float[Tensor, "rows blocks 1"]]:
    """Blocks of float32 numbers in a format that follows Transformer Engine, and the scale that each was read back by.

    A block that holds NaN or an infinity becomes NaN throughout.

    Args:
        blocks: the numbers.
        fmt: the format.
        encoding: the encoding scale g of the tensor, or of each row; None for 1.
        words: 32 random bits for each number (int64) for stochastic rounding of the elements; None rounds to nearest.
            The choice between two scales is made by the error of rounding to nearest in either case.
    """
    amax = blocks.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    x = torch.where(finite, blocks, 0.0)
    g = torch.ones(1, 1, 1, dtype=torch.float32, device=blocks.device) if encoding is None else encoding
    stored = torch.where(finite, amax, 0.0) * (g / fmt.divisor)
    scale = round_to_grid(stored.clone(), E4M3)
    if fmt.tries_two_scales:
        second = round_to_grid(stored * _SECOND_CANDIDATE, E4M3)
        first_error, second_error = (_error(x, fmt, s, g) for s in (scale, second))
        scale = torch.where(second_error < first_error, second, scale)
    decoding = 1.0 / g
    result = _elements(x, fmt, scale, g, words) * scale * decoding
    return torch.where(finite, result, math.nan).copysign(blocks), torch.where(finite, scale * decoding, math.nan)


def _elements(x: Tensor, fmt: Format, scale: Tensor, g: Tensor, words: Tensor | None) -> Tensor:
    """The stored elements under a stored scale."""
    assert fmt.element is not None
    quotient = x * (1.0 / (scale * (1.0 / g))).clamp(max=_LARGEST)
    return round_to_grid(quotient, fmt.element) if words is None else round_stochastic(quotient, fmt.element, words)


def _error(x: Tensor, fmt: Format, scale: Tensor, g: Tensor) -> Tensor:
    """Sum of the squared or the absolute errors of each block under a stored scale, in the order of the elements.

    The public code reads back by dividing by g here, and by multiplying by 1 / g for the result; blocks whose two
    errors are nearly equal show the difference.
    """
    error = _elements(x, fmt, scale, g, None) * scale / g - x
    error = error.abs() if fmt.rule == "46_mae" else error.square()
    total = error[..., :1].clone()
    for i in range(1, error.shape[-1]):
        total += error[..., i : i + 1]
    return total
