"""Gaussian error of a matrix product with a standard deviation that is not that of `matmul_noise`: `y + std * eps`.

The eps are those that `matmul_noise` draws for the same key, rows and columns; only their scale is another one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.numerics.rng import Key, normal

_CHUNK = 1 << 20  # draws that are held at a time


def scaled_noise(
    y: Float[Tensor, "*rows columns"],
    std: Float[Tensor, "*rows _columns"],
    key: Key,
    *,
    rows: Int[Tensor, "*rows"] | None = None,
    column_start: Int[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """Add Gaussian error to a matrix product, in place: `y + std * eps`, with eps ~ N(0, 1).

    Args:
        y: the product, float32, bfloat16 or float16. The sum is computed in float32 and rounded once to this dtype.
        std: standard deviation of each element, in units of y, or of each row ([*rows, 1]).
        key: key of this product's draws.
        rows: identity of each row, int64; the default counts the rows from 0.
        column_start: logical index of each row's first column, int64; default 0.

    Returns:
        `y` itself.
    """
    if y.numel() == 0:
        return y
    columns = y.shape[-1]
    flat, widths = y.reshape(-1, columns), std.reshape(-1, std.shape[-1])
    count = len(flat)
    ids = torch.arange(count, device=y.device) if rows is None else rows.reshape(-1)
    starts = None if column_start is None else column_start.reshape(-1)
    step = max(1, _CHUNK // columns)
    with torch.no_grad():
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            eps = normal(
                key,
                (len(ids[part]), columns),
                rows=ids[part],
                column_start=None if starts is None else starts[part],
                device=y.device,
            )
            flat[part] = eps.mul_(widths[part]).add_(flat[part].to(torch.float32)).to(y.dtype)
        return y if flat.data_ptr() == y.data_ptr() else y.copy_(flat.view(y.shape))


def operand_std(a: Float[Tensor, "*rows k"], b: Float[Tensor, "*_batch columns k"]) -> Float[Tensor, "*rows columns"]:
    """`sqrt(sum_k (a_ik * b_jk)^2)` for each element of `a @ b^T` (float32), in units of the product.

    It is what errors of the single products add up to if they are independent and relative to each product, as rounding
    errors are in the model of Higham and Mary (SIAM Journal on Scientific Computing 41, A2815, 2019).
    """
    squares = a.to(torch.float32).square(), b.to(torch.float32).square()
    return squares[0].matmul(squares[1].transpose(-1, -2)).sqrt_()


def row_std(y: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows 1"]:
    """The root mean square of each row (float32), in units of y."""
    return y.to(torch.float32).square().mean(-1, keepdim=True).sqrt_()
