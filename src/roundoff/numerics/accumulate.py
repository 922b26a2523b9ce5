"""The sum of a matrix product by an accumulator of few bits, as in low-precision matrix units.

`a @ b^T` is summed along k in chunks of `promote` products. A chunk begins with a partial sum of zero. One instruction
after the other adds a `group` of products to it, and each time the partial sum is rounded to `mantissa` bits after the
leading one. At its end the chunk is promoted: the partial sum is added to a float32 accumulator (to nearest). With p
the partial sum, t_i the products of a group and e the exponent of the largest of abs(p), abs(t_1), ..., the roundings
are

    align      u = 2^(e - mantissa);  p <- cut(u (trunc(p / u) + sum_i trunc(t_i / u)))
    truncate   p <- cut(p + sum_i t_i)
    nearest    p <- nearest(p + sum_i t_i)

where `trunc` drops the fraction, `cut` the bits after the first `mantissa` ones (both toward zero), and `nearest`
rounds to them with ties to even. `align` is what Hopper's tensor cores do in FP8: "aligning the mantissa products by
right-shifting based on the maximum exponent before addition", with the highest 14 bits kept and the others truncated
(DeepSeek-V3, arXiv:2412.19437, sections 3.3.2 and 3.5.2; probes of an H100 find 13 bits after the leading one, toward
zero: github.com/huweim/emulation_sys). One of its instructions takes 32 products of 8 bits (K of `wgmma`, PTX ISA).

Products of float32 operands are rounded to float32 in `align`; those of operands of up to 12 bits, such as bfloat16 and
every low-precision format, are exact. In the other modes products are exact, and groups are summed in float64, whose
rounding is 2^29 times finer than float32's. So no result depends on the order of a library's sums, on threads, or on
how rows are split. In `align`, exponents below -103 count as -103, so that u stays a normal number of float32.

Worked example with 3 bits, `group = 2`: p = 8, products 1.75 and -0.9. The largest has e = 3, so u = 1: align gives
8 + 1 - 0 = 9; the exact sum 8.85 has the neighbours 8 and 9: truncate gives 8, nearest 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.numerics.backend import Kernels, kernels_for, thread_count

OUTPUTS = 1 << 19
"""Outputs that are computed at a time where products are not kept, in float64."""
PRODUCTS = 1 << 20
"""Products that are held at a time under `align` on the torch path, in float32."""
COLUMNS = 16
"""The compiled kernel takes this many columns, or a multiple of them."""
LARGEST_HALF, TINY_HALF = 65504.0, 2.0**-14
"""Largest and smallest normal number of float16."""


@dataclass(frozen=True, slots=True)
class PartialSums:
    """How products are summed.

    Raises:
        ValueError: if a number is out of range.
    """

    mantissa: int
    """Bits of a partial sum after the leading one, 2 to 23."""
    promote: int
    """Number of products in a chunk."""
    group: int
    """Number of products that are added at a time."""
    rounding: Literal["align", "truncate", "nearest"]
    """How a partial sum is rounded."""
    half: bool = False
    """Whether a partial sum has the exponents of float16: beyond 65,504 it is infinite, and below 2^-14 it is a
    multiple of 2^-24."""

    def __post_init__(self) -> None:
        if not (2 <= self.mantissa <= 23 and 1 <= self.group <= self.promote and self.promote % self.group == 0):
            raise ValueError(f"mantissa must be 2 to 23, and promote a multiple of group, but this is {self}")

    @property
    def fits_int32(self) -> bool:
        """Whether the sum of the whole numbers of a group and the partial sum, under `align`, stays below 2^31."""
        return (self.group + 1) << (self.mantissa + 1) <= 1 << 31


def accumulated(
    a: Float[Tensor, "rows k"], b: Float[Tensor, "columns k"], sums: PartialSums
) -> Float[Tensor, "rows columns"]:
    """`a @ b^T`, summed as `sums` says and rounded once to the dtype of `a`.

    Args:
        a: the first operand, float32, bfloat16 or float16; each of its rows gives a row of the result.
        b: the second operand, of the same dtype.
        sums: how the products are summed.

    Raises:
        ValueError: if the operands differ in dtype or in their number of columns.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or a.dtype != b.dtype:
        raise ValueError(
            f"the operands must be [rows, k] and [columns, k] of one dtype, but are {tuple(a.shape)} of {a.dtype} and "
            f"{tuple(b.shape)} of {b.dtype}"
        )
    if sums.group > a.shape[1] > 0:  # one group holds all products
        sums = replace(sums, group=a.shape[1], promote=a.shape[1])
    kernels = kernels_for(a) if sums.rounding == "align" and sums.fits_int32 else None
    if kernels is not None and a.shape[0] and b.shape[0]:
        return _compiled(kernels, a.detach(), b.detach(), sums)
    out = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype, device=a.device)
    held = PRODUCTS // sums.group if sums.rounding == "align" else OUTPUTS
    with torch.no_grad():
        for rows, columns in _tiles(a.shape[0], b.shape[0], max(1, held)):
            out[rows, columns] = _summed(a[rows], b[columns], sums)
    return out


def _compiled(kernels: Kernels, a: Tensor, b: Tensor, sums: PartialSums) -> Tensor:
    """`align` by the compiled kernel, on columns padded to a multiple of sixteen."""
    rows, length = a.shape
    columns = b.shape[0]
    left = a.to(torch.float32).contiguous()
    right = torch.nn.functional.pad(b.t().to(torch.float32), (0, -columns % COLUMNS)).contiguous()
    out = torch.empty(rows, right.shape[1], dtype=torch.float32, device=a.device)
    kernels.accumulate(
        left.data_ptr(),
        right.data_ptr(),
        out.data_ptr(),
        rows,
        length,
        right.shape[1],
        sums.mantissa,
        sums.promote,
        sums.group,
        sums.half,
        thread_count(rows * length * columns // 4),
    )
    return out[:, :columns].to(a.dtype).contiguous()


def _tiles(rows: int, columns: int, held: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows and columns of an output, of at most `held` elements together."""
    width = min(columns, held)
    height = max(1, held // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, columns, max(1, width)):
            yield slice(top, top + height), slice(left, left + width)


def _summed(a: Tensor, b: Tensor, sums: PartialSums) -> Tensor:
    """The result [rows, columns] of one tile in float32."""
    add, dtype = (_aligned, torch.float32) if sums.rounding == "align" else (_rounded, torch.float64)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    length = a.shape[1]
    for start in range(0, length, sums.promote):
        partial = torch.zeros_like(total, dtype=dtype)
        for first in range(start, min(start + sums.promote, length), sums.group):
            group = slice(first, first + sums.group)
            partial = add(partial, a[:, group].to(dtype), b[:, group].to(dtype), sums)
        total += partial.to(torch.float32)
    return total


def _rounded(partial: Tensor, a: Tensor, b: Tensor, sums: PartialSums) -> Tensor:
    """The partial sum (float64) after one group under `truncate` or `nearest`."""
    exact = torch.addmm(partial, a, b.t())
    nearest = sums.rounding == "nearest"
    fraction = 52 - sums.mantissa
    bits = exact.view(torch.int64)
    if nearest:
        bits = bits + ((bits >> fraction) & 1) + ((1 << (fraction - 1)) - 1)
    result = (bits & -(1 << fraction)).view(torch.float64)
    return _as_half(result, exact, nearest) if sums.half else result


def _aligned(partial: Tensor, a: Tensor, b: Tensor, sums: PartialSums) -> Tensor:
    """The partial sum (float32) after one group under `align`."""
    products = a.t()[:, :, None] * b.t()[:, None, :]  # [group, rows, columns]
    largest = torch.maximum(products.abs().amax(0), partial.abs())
    # 2^e; NaN and Inf become 2^127, so that they stay what they are below.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(2.0**-103, 2.0**127)
    inverse = (((sums.mantissa + 254) << 23) - power.view(torch.int32)).view(torch.float32)  # 2^mantissa / power
    # Whole numbers below 2^(mantissa + 1): their sum is exact in float32 if it stays below 2^24.
    wide = (1 << (sums.mantissa + 1)) * (len(products) + 1) > 1 << 24
    total = products.mul_(inverse).trunc_().sum(0, dtype=torch.float64 if wide else torch.float32)
    total += partial.mul(inverse).trunc_()
    total *= 2.0**-sums.mantissa
    total *= power
    if wide:
        result = (total.view(torch.int64) & -(1 << (52 - sums.mantissa))).view(torch.float64).to(torch.float32)
    elif sums.mantissa < 23:
        result = (total.view(torch.int32) & -(1 << (23 - sums.mantissa))).view(torch.float32)
    else:
        result = total
    return _as_half(result, result, nearest=False) if sums.half else result


def _as_half(result: Tensor, exact: Tensor, nearest: bool) -> Tensor:
    """A rounded partial sum in the exponents of float16; `exact` is the sum before rounding."""
    units = exact * 2.0**24
    small = (units.round() if nearest else units.trunc()) * 2.0**-24
    result = torch.where(exact.abs() < TINY_HALF, small, result)
    return torch.where(result.abs() > LARGEST_HALF, result * torch.inf, result)
