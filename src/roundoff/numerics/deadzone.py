"""The deadzone of an analog unit: small numbers count as zero."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def outside_of_deadzone(x: Float[Tensor, "*shape"], fraction: float, axis: int = -1) -> Float[Tensor, "*shape"]:
    """`x` with 0 in place of every number below `fraction` times the largest magnitude along the axis.

    The threshold is computed in the dtype of `x`. Where a number along the axis is NaN, nothing is replaced.
    """
    size = x.abs()
    return x.masked_fill(size < fraction * size.amax(axis, keepdim=True), 0.0)
