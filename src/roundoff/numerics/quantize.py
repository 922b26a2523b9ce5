"""Quantize-dequantize of a tensor: the values that remain after storing it in a format and reading it back.

Blocks lie along `axis` and never cross a row; a row whose length is not a multiple of the block is padded with zeros
and cut back. The compiled kernels and plain torch give the same bits, with any number of threads. The result carries
no gradient: `roundoff.hardware` decides how a gradient passes (straight-through).

On a GPU or NPU the work is one operator, `roundoff::quantize`, which `torch.compile` takes as a whole. It launches
Triton's kernels if they can be used, and computes in plain torch otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from roundoff.formats.table import FORMATS, Format, get_format

from .backend import DTYPES, Kernels, can_write, kernels_for, may_use_triton, thread_count, uses_triton
from .blocks import (
    FROM_ROW,
    FROM_TENSOR,
    GIVEN,
    GIVEN_ROWS,
    NONE,
    matrices_of,
    one_row_a_block,
    quantize_matrices,
    tiles_of,
)
from .deadzone import outside_of_deadzone
from .memory import empty_like
from .rng import Key, key_of, signed
from .transfer import put
from .triton_kernels.layout import Layout, format_of, holds_rows, layout_of

_LARGEST = torch.finfo(torch.float32).max
_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def quantize(
    x: Float[Tensor, "*shape"],
    fmt: str | Format,
    *,
    axis: int = -1,
    tensor_scale: str | float | Float[Tensor, " ..."] | None = None,
    out: Float[Tensor, "*shape"] | None = None,
    stochastic: Key | None = None,
    deadzone: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """Store `x` in a number format and read it back; the result has the shape and dtype of `x`.

    Args:
        x: the tensor, float32, bfloat16 or float16; never changed unless it is also `out`. Numbers are computed in
            float32 and rounded once to this dtype.
        fmt: the name of an entry of `FORMATS`, or a `Format`.
        axis: the axis along which blocks lie: the contraction axis of the product that `x` enters. Two-dimensional
            blocks span the last one of the other axes as well.
        tensor_scale: for formats with a float32 scale for the whole tensor (nvfp4, fp8_e4m3): None computes it from the
            tensor's finite values; "row" computes one for each row along the axis, so that the result of a token does
            not depend on its batch; a number, or a tensor that broadcasts to [..., 1], is used as it is (nvfp4:
            amax / 2688; nvfp4:46: amax / 1536; fp8_e4m3: amax / 448). Formats without such a scale accept None and
            "row" and ignore them. Formats with two-dimensional blocks accept None and a number.
            A tensor on a device must be finite and not negative; where it is not, the result there is NaN.
        out: where to write; same shape and dtype as `x`, and may be `x`.
        stochastic: key of the random bits for stochastic rounding, which rounds up or down at random, by row and
            column; None rounds to nearest.
        deadzone: numbers below this fraction of the largest magnitude along the axis count as zero
            (fraction, in [0, 1]).

    Raises:
        TypeError, ValueError, IndexError: if an argument cannot be used; nothing has been written then.
    """
    if isinstance(fmt, str):
        fmt = FORMATS.get(fmt) or get_format(fmt)
    _check(x, fmt, axis, out, stochastic)
    if deadzone and not 0 <= deadzone <= 1:
        raise ValueError(f"deadzone must be a fraction of the largest magnitude, in [0, 1], but is {deadzone}")
    source, scales = _source(x, fmt, axis, tensor_scale)
    form = layout_of(fmt) if may_use_triton(x) else None
    if deadzone and not (form is not None and x.dim() and _is_fused(x.shape[axis], form, source)):
        with torch.no_grad():
            x = outside_of_deadzone(x, deadzone, axis) if x.numel() and x.dim() else x
            return quantize(x, fmt, axis=axis, tensor_scale=tensor_scale, out=out, stochastic=stochastic)
    if fmt.element is None:
        return _cast(x, fmt, out, stochastic)
    if form is not None:
        with torch.no_grad():
            return _on_device(x, form, fmt, axis, source, scales, out, stochastic, deadzone)
    kernels = kernels_for(x) if fmt.has_kernel else None
    if kernels is not None and x.dtype is torch.float16:  # which the kernels do not know
        result = quantize(
            x.detach().to(torch.float32), fmt, axis=axis, tensor_scale=tensor_scale, stochastic=stochastic
        )
        with torch.no_grad():
            return result.to(torch.float16) if out is None else out.copy_(result)
    last = axis == -1 or axis == x.dim() - 1
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


def _is_fused(columns: int, form: Layout, source: int) -> bool:
    """Whether one kernel computes deadzone and format: that of whole rows, without scales from elsewhere."""
    return source in (NONE, FROM_ROW) and holds_rows(columns, form)


def _on_device(
    x: Tensor,
    form: Layout,
    fmt: Format,
    axis: int,
    source: int,
    scales: float | Tensor,
    out: Tensor | None,
    stochastic: Key | None,
    deadzone: float,
) -> Tensor:
    """The path on a GPU or NPU, of any memory layout and axis: one operator on contiguous memory."""
    moved = (x.movedim(axis, -1) if x.dim() else x.reshape(1)).contiguous()
    last = axis == -1 or axis == x.dim() - 1
    target = None
    if out is not None and not torch.compiler.is_compiling() and last and x.is_contiguous() and can_write(out, x):
        target = out
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    given, scalar = (scales, 1.0) if isinstance(scales, Tensor) else (None, scales)
    key = None if stochastic is None else signed(stochastic)
    if torch.compiler.is_compiling():
        rows = torch.ops.roundoff.quantize(moved, form[:8], form[8:], source, given, scalar, key, deadzone)
    else:
        rows = _launched(moved, form, fmt, source, given, scalar, key, deadzone, target)
    if target is not None:
        return target
    result: Tensor = rows.movedim(-1, axis) if x.dim() else rows.reshape(())
    return result.contiguous() if out is None else out.copy_(result)


def _launched(
    x: Tensor,
    form: Layout,
    fmt: Format,
    source: int,
    given: Tensor | None,
    scalar: float,
    key: int | None,
    deadzone: float,
    out: Tensor | None,
) -> Tensor:
    """Quantize contiguous memory with blocks along the last axis by Triton's kernels, if they can be used."""
    if uses_triton(x):
        from .triton_kernels import launch

        if launch.can_quantize(x.shape, form):
            out = torch.empty_like(x) if out is None else out
            launch.quantize(x, out, form, source, given, scalar, key, deadzone)
            return out
    stochastic = None if key is None else key_of(key)
    if deadzone and x.numel():
        x = outside_of_deadzone(x, deadzone)
    result = quantize_matrices(x, fmt, source, scalar if given is None else given, stochastic)
    return result.contiguous() if out is None else out.copy_(result)


@torch.library.custom_op(
    "roundoff::quantize",
    mutates_args=(),
    schema="(Tensor x, int[] whole, float[] real, int source, Tensor? given, float scalar, int? key, float deadzone)"
    " -> Tensor",
)
def _operator(
    x: Tensor,
    whole: Sequence[int],
    real: Sequence[float],
    source: int,
    given: Tensor | None,
    scalar: float,
    key: int | None,
    deadzone: float,
) -> Tensor:
    form = Layout(*whole, *real)
    return _launched(x, form, format_of(form), source, given, scalar, key, deadzone, None)


@_operator.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
    flat = one_row_a_block(fmt) if fmt.rows > 1 and x.numel() else fmt
    of_tiles = kernels_for(x) if flat is not fmt and flat.has_kernel and x.dtype is not torch.float16 else None
    if kernels is not None:
        rows = _compiled(kernels, moved.contiguous(), fmt, source, scales, None, stochastic)
    elif of_tiles is not None:  # the zeros of the padding do not change the scale of the whole tensor
        matrices = moved if moved.dim() > 1 else moved[None]
        tiles = tiles_of(matrices, fmt).contiguous()
        rows = _compiled(of_tiles, tiles, flat, source, scales, None, stochastic)
        rows = matrices_of(rows, fmt, matrices.shape).reshape(moved.shape)
    else:
        rows = quantize_matrices(moved, fmt, source, scales, stochastic)
    result = rows.movedim(-1, axis) if x.dim() else rows.reshape(())
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
    if dtype not in DTYPES:
        raise TypeError(f"quantize takes float32, bfloat16 or float16, but the tensor is {dtype}; convert it first")
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
            return NONE, 1.0
        raise ValueError(f"format {fmt.name!r} has no tensor scale, but tensor_scale is {tensor_scale!r}; leave it out")
    if tensor_scale is None:
        return FROM_TENSOR, 1.0
    if isinstance(tensor_scale, str):
        if tensor_scale == "row":
            return FROM_ROW, 1.0
        raise ValueError(f'tensor_scale must be None, "row", a number or a tensor, but is {tensor_scale!r}')
    if isinstance(tensor_scale, Tensor):
        return _given_scales(x, axis, tensor_scale)
    if not 0 <= tensor_scale <= _LARGEST:
        raise ValueError(f"tensor_scale must be finite and not negative in float32, but is {tensor_scale}")
    return GIVEN, float(tensor_scale)


def _given_scales(x: Tensor, axis: int, scale: Tensor) -> tuple[int, float | Tensor]:
    """A scale tensor that the caller passed, as a number or as float32 [rows]."""
    scale = put(scale.detach(), x.device, torch.float32)
    valid = scale.isfinite() & (scale >= 0)
    if not x.is_cpu or may_use_triton(x):  # asking whether all are valid would wait for the device
        scale = torch.where(valid, scale, torch.nan)
        if scale.numel() == 1:
            return GIVEN_ROWS, scale.reshape(1)
    elif not bool(valid.all()):
        raise ValueError("tensor_scale must be finite and not negative in float32, but holds other values")
    elif scale.numel() == 1:
        return GIVEN, float(scale)
    shape = list(x.shape)
    if shape:
        del shape[axis]
    try:
        return GIVEN_ROWS, scale.broadcast_to((*shape, 1)).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(f"tensor_scale must broadcast to {(*shape, 1)}, but has shape {tuple(scale.shape)}") from None
