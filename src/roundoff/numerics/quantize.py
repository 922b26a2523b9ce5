"""Quantize-dequantize of a tensor: what a number becomes when it is stored in a format and read back.

Blocks lie along `axis` and never cross a row; a row whose length is no multiple of the block is padded with zeros and
cut back. Results are the same bits whether compiled or in plain torch, and for any number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import quantize_rows, tensor_scales
from .formats import Format, get_format
from .rng import Key

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    axis: int = -1,
    tensor_scale: None | str | float | Tensor = None,
    out: Tensor | None = None,
    stochastic: Key | None = None,
) -> Tensor:
    """`x` (float32 or bfloat16, any shape) stored in a format and read back; same shape and dtype.

    Args:
        x: the tensor; never changed unless it is also `out`.
        fmt: a name of `FORMATS` or a `Format`.
        axis: the axis along which blocks lie: the contraction axis of the product that `x` enters.
        tensor_scale: for formats with a float32 scale of the whole tensor (nvfp4, fp8_e4m3): None computes it from the
            tensor, "row" from each row along the axis (a token's result then does not depend on its batch), a number
            or a tensor that broadcasts to [..., 1] is used as given (nvfp4: amax / 2688; fp8_e4m3: amax / 448).
            Formats without such a scale accept None and "row" and ignore them.
        out: where to write; same shape and dtype as `x`, and may be `x`.
        stochastic: round up or down at random instead of to nearest; the bits come from this key, row and column.

    Raises:
        TypeError, ValueError, IndexError: before anything is written.
    """
    if isinstance(fmt, str):
        fmt = get_format(fmt)
    rows = _check(x, fmt, axis, out)
    if fmt.element is None:
        if stochastic is not None:
            raise ValueError(f"stochastic rounding is defined for block formats, not for the cast {fmt.name!r}")
        result = x.to(_CASTS[fmt.name])
        return result.to(x.dtype) if out is None else out.copy_(result)
    scales = _scales(x, rows, fmt, axis, tensor_scale)
    target = torch.empty_like(rows, memory_format=torch.contiguous_format)
    quantize_rows(rows, fmt, scales, target, stochastic)
    result = target.reshape(_moved_shape(x, axis)).movedim(-1, axis) if x.dim() else target.reshape(())
    return result if out is None else out.copy_(result)


def _moved_shape(x: Tensor, axis: int) -> list[int]:
    shape = list(x.shape)
    shape.append(shape.pop(axis))
    return shape


def _check(x: Tensor, fmt: Format, axis: int, out: Tensor | None) -> Tensor:
    """`x` as rows [R, K], after every argument was checked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize takes a torch.Tensor, but got {type(x).__name__}")
    if x.dtype is not torch.float32 and x.dtype is not torch.bfloat16:
        raise TypeError(f"quantize takes float32 or bfloat16, but the tensor is {x.dtype}; convert it first")
    dims = max(1, x.dim())
    if not -dims <= axis < dims:
        raise IndexError(f"axis must be in [{-dims}, {dims - 1}] for a tensor of shape {tuple(x.shape)}, but is {axis}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(
            f"out must be {x.dtype} of shape {tuple(x.shape)} on {x.device} like x, "
            f"but is {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    moved = x.movedim(axis, -1) if x.dim() else x.reshape(1)
    columns = moved.shape[-1]
    return moved.reshape(x.numel() // columns if columns else 0, columns)


def _scales(
    x: Tensor, rows: Tensor, fmt: Format, axis: int, tensor_scale: None | str | float | Tensor
) -> Tensor | None:
    """The tensor scales [1, 1] or [R, 1] that a format needs, given or computed."""
    if fmt.tensor_divisor is None:
        if tensor_scale is None or (isinstance(tensor_scale, str) and tensor_scale == "row"):
            return None
        raise ValueError(f"format {fmt.name!r} has no tensor scale, but tensor_scale is {tensor_scale!r}; leave it out")
    if tensor_scale is None:
        return tensor_scales(rows, fmt, per_row=False)
    if isinstance(tensor_scale, str):
        if tensor_scale != "row":
            raise ValueError(f'tensor_scale must be None, "row", a number or a tensor, but is {tensor_scale!r}')
        return tensor_scales(rows, fmt, per_row=True)
    if isinstance(tensor_scale, Tensor):
        return _given_scales(x, axis, tensor_scale)
    if not (math.isfinite(tensor_scale) and tensor_scale >= 0):
        raise ValueError(f"tensor_scale must be finite and not negative, but is {tensor_scale}")
    return torch.full((1, 1), tensor_scale, dtype=torch.float32, device=x.device)


def _given_scales(x: Tensor, axis: int, scale: Tensor) -> Tensor:
    """A given scale tensor as [1, 1] or [R, 1]."""
    scale = scale.detach().to(device=x.device, dtype=torch.float32)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError("tensor_scale must be finite and not negative, but holds other values")
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    shape = (*_moved_shape(x, axis)[:-1], 1)
    try:
        return scale.broadcast_to(shape).reshape(-1, 1)
    except RuntimeError:
        raise ValueError(f"tensor_scale must broadcast to {shape}, but has shape {tuple(scale.shape)}") from None
