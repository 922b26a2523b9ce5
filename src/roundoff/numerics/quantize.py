"""Quantize-dequantize of a tensor: the values that remain after storing it in a format and reading it back.

Blocks lie along `axis` and never cross a row; a row whose length is not a multiple of the block is padded with zeros
and cut back. The compiled kernels and plain torch give the same bits, with any number of threads. The result carries
no gradient: `roundoff.hardware` decides how a gradient passes (straight-through).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.formats.table import FORMATS, Format, get_format

from .backend import Kernels, can_write, kernels_for, thread_count
from .blocks import matrices_of, one_row_a_block, quantize_rows, tensor_scales, tiles_of
from .memory import empty_like
from .rng import Key

_LARGEST = torch.finfo(torch.float32).max
_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Origins of the tensor scales: the enum `Source` of kernels/roundoff.cpp.
_NONE, _FROM_TENSOR, _FROM_ROW, _GIVEN, _GIVEN_ROWS = range(5)


def quantize(
    x: Float[Tensor, "*shape"],
    fmt: str | Format,
    *,
    axis: int = -1,
    tensor_scale: str | float | Float[Tensor, " ..."] | None = None,
    out: Float[Tensor, "*shape"] | None = None,
    stochastic: Key | None = None,
) -> Float[Tensor, "*shape"]:
    """Store `x` in a number format and read it back; the result has the shape and dtype of `x`.

    Args:
        x: the tensor, float32 or bfloat16; never changed unless it is also `out`.
        fmt: the name of an entry of `FORMATS`, or a `Format`.
        axis: the axis along which blocks lie: the contraction axis of the product that `x` enters. Two-dimensional
            blocks span the last one of the other axes as well.
        tensor_scale: for formats with a float32 scale for the whole tensor (nvfp4, fp8_e4m3): None computes it from the
            tensor's finite values; "row" computes one for each row along the axis, so that the result of a token does
            not depend on its batch; a number, or a tensor that broadcasts to [..., 1], is used as it is (nvfp4:
            amax / 2688; nvfp4:46: amax / 1536; fp8_e4m3: amax / 448). Formats without such a scale accept None and
            "row" and ignore them. Formats with two-dimensional blocks accept None and a number.
        out: where to write; same shape and dtype as `x`, and may be `x`.
        stochastic: key of the random bits for stochastic rounding, which rounds up or down at random, by row and
            column; None rounds to nearest.

    Raises:
        TypeError, ValueError, IndexError: if an argument cannot be used; nothing has been written then.
    """
    if isinstance(fmt, str):
        fmt = FORMATS.get(fmt) or get_format(fmt)
    _check(x, fmt, axis, out, stochastic)
    source, scales = _source(x, fmt, axis, tensor_scale)
    if fmt.element is None:
        return _cast(x, fmt, out, stochastic)
    if fmt.rows > 1:
        with torch.no_grad():
            return _two_dimensional(x, fmt, axis, source, scales, out, stochastic)
    last = axis == -1 or axis == x.dim() - 1
    kernels = kernels_for(x) if fmt.has_kernel else None
    if kernels is not None and last and x.is_contiguous() and (out is None or can_write(out, x)):
        return _compiled(kernels, x, fmt, source, scales, out, stochastic)
    with torch.no_grad():
        return _general(kernels, x, fmt, axis, source, scales, out, stochastic)


def _compiled(
    kernels: Kernels,
    x: Tensor,
    fmt: Format,
    source: int,
    scales: float | Tensor,
    out: Tensor | None,
    stochastic: Key | None,
) -> Tensor:
    """The compiled path, on contiguous memory with blocks along the last axis."""
    if out is None:
        y = empty_like(x)
    else:
        y = out
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # so that caches keyed on a tensor's version notice the write
    count = x.numel()
    if count == 0:
        return y
    columns = x.shape[-1] if x.dim() else 1
    scalar, per_row = (1.0, scales.data_ptr()) if isinstance(scales, Tensor) else (scales, None)
    kernels.quantize(
        fmt.packed,
        0 if x.dtype is torch.float32 else 1,
        x.data_ptr(),
        y.data_ptr(),
        count // columns,
        columns,
        source,
        scalar,
        per_row,
        stochastic is not None,
        0 if stochastic is None else stochastic.value,
        thread_count(count),
    )
    return y


def _general(
    kernels: Kernels | None,
    x: Tensor,
    fmt: Format,
    axis: int,
    source: int,
    scales: float | Tensor,
    out: Tensor | None,
    stochastic: Key | None,
) -> Tensor:
    """The path for any memory layout, axis and device: gather the rows, quantize them, and put them back."""
    moved = x.movedim(axis, -1) if x.dim() else x.reshape(1)
    if kernels is not None:
        rows = _compiled(kernels, moved.contiguous(), fmt, source, scales, None, stochastic)
    else:
        columns = moved.shape[-1]
        flat = moved.reshape(moved.numel() // columns if columns else 0, columns)
        rows = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        quantize_rows(flat, fmt, _row_scales(flat, fmt, source, scales), rows, stochastic)
        rows = rows.reshape(moved.shape)
    result = rows.movedim(-1, axis) if x.dim() else rows.reshape(())
    return result.contiguous() if out is None else out.copy_(result)


def _two_dimensional(
    x: Tensor, fmt: Format, axis: int, source: int, scales: float | Tensor, out: Tensor | None, stochastic: Key | None
) -> Tensor:
    """Blocks that span rows as well: lay out each block as a row of its own, quantize the rows, and put them back."""
    matrices = (x.movedim(axis, -1) if x.dim() > 1 else x.reshape(1, -1)).contiguous()
    if x.numel() == 0:
        return x.clone() if out is None else out
    tiles = tiles_of(matrices, fmt)
    flat = one_row_a_block(fmt)
    kernels = kernels_for(x) if flat.has_kernel else None
    if kernels is not None:  # the zeros of the padding do not change the scale of the whole tensor
        rows = _compiled(kernels, tiles.contiguous(), flat, source, scales, None, stochastic)
    else:
        rows = torch.empty_like(tiles)
        given = _row_scales(matrices.reshape(-1, matrices.shape[-1]), fmt, source, scales)
        quantize_rows(tiles, flat, given, rows, stochastic)
    result = matrices_of(rows, fmt, matrices.shape)
    result = result.movedim(-1, axis) if x.dim() > 1 else result.reshape(x.shape)
    return result.contiguous() if out is None else out.copy_(result)


def _cast(x: Tensor, fmt: Format, out: Tensor | None, stochastic: Key | None) -> Tensor:
    """Cast to the format's dtype and back, with torch's own operators on every path."""
    if stochastic is not None:
        raise ValueError(f"stochastic rounding is defined for block formats, not for the cast {fmt.name!r}")
    with torch.no_grad():
        result = x.to(_CASTS[fmt.name])
        if result is x and out is not x and (out is None or not (x.is_contiguous() and can_write(out, x))):
            result = x.clone()
        return result.to(x.dtype) if out is None else out.copy_(result)


def _check(x: Tensor, fmt: object, axis: int, out: Tensor | None, stochastic: object) -> None:
    """Refuse arguments that cannot be used, before anything is written."""
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize takes a torch.Tensor, but got {type(x).__name__}")
    if not isinstance(fmt, Format):
        raise TypeError(f"a format is a name such as 'mxfp4' or a Format, but got {type(fmt).__name__}")
    if stochastic is not None and not isinstance(stochastic, Key):
        raise TypeError(f"stochastic must be a Key (Key.from_seed(0)) or None, but is {stochastic!r}")
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        raise TypeError(f"quantize takes float32 or bfloat16, but the tensor is {dtype}; convert it first")
    if axis != -1:
        dims = max(1, x.dim())
        if not -dims <= axis < dims:
            raise IndexError(
                f"axis must be in [{-dims}, {dims - 1}] for a tensor of shape {tuple(x.shape)}, but is {axis}"
            )
    if out is None or out is x:
        return
    if out.shape != x.shape or out.dtype is not dtype or out.device != x.device:
        raise ValueError(
            f"out must be {dtype} of shape {tuple(x.shape)} on {x.device} like x, "
            f"but is {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )


def _source(x: Tensor, fmt: Format, axis: int, tensor_scale: str | float | Tensor | None) -> tuple[int, float | Tensor]:
    """The origin of the tensor scales, and those that the caller passed: a number, or float32 [rows]."""
    if fmt.rows > 1 and (isinstance(tensor_scale, Tensor) or tensor_scale == "row"):
        raise ValueError(f"blocks of {fmt.name!r} span rows, so that a row cannot have a tensor scale of its own")
    if fmt.tensor_divisor is None:
        if tensor_scale is None or (isinstance(tensor_scale, str) and tensor_scale == "row"):
            return _NONE, 1.0
        raise ValueError(f"format {fmt.name!r} has no tensor scale, but tensor_scale is {tensor_scale!r}; leave it out")
    if tensor_scale is None:
        return _FROM_TENSOR, 1.0
    if isinstance(tensor_scale, str):
        if tensor_scale == "row":
            return _FROM_ROW, 1.0
        raise ValueError(f'tensor_scale must be None, "row", a number or a tensor, but is {tensor_scale!r}')
    if isinstance(tensor_scale, Tensor):
        return _given_scales(x, axis, tensor_scale)
    if not 0 <= tensor_scale <= _LARGEST:
        raise ValueError(f"tensor_scale must be finite and not negative in float32, but is {tensor_scale}")
    return _GIVEN, float(tensor_scale)


def _given_scales(x: Tensor, axis: int, scale: Tensor) -> tuple[int, float | Tensor]:
    """A scale tensor that the caller passed, as a number or as float32 [rows]."""
    scale = scale.detach().to(device=x.device, dtype=torch.float32)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError("tensor_scale must be finite and not negative in float32, but holds other values")
    if scale.numel() == 1:
        return _GIVEN, float(scale)
    shape = list(x.shape)
    del shape[axis]
    try:
        return _GIVEN_ROWS, scale.broadcast_to((*shape, 1)).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(f"tensor_scale must broadcast to {(*shape, 1)}, but has shape {tuple(scale.shape)}") from None


def _row_scales(rows: Tensor, fmt: Format, source: int, scales: float | Tensor) -> Tensor | None:
    """Tensor scales [1, 1] or [rows, 1] for the torch path."""
    if source == _NONE:
        return None
    if isinstance(scales, Tensor) or source == _GIVEN:
        if not isinstance(scales, Tensor):
            scales = torch.full((1, 1), scales, dtype=torch.float32, device=rows.device)
        scales = scales.reshape(-1, 1)
        return (1.0 / scales).clamp(max=_LARGEST) if fmt.follows_transformer_engine else scales
    return tensor_scales(rows, fmt, per_row=source == _FROM_ROW)
