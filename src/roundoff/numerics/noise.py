"""Relative Gaussian error of a matrix product: `y + s * |y| * eps`, with eps replayable from a key.

`eps[r, j]` depends only on the key, the id of row r and the logical column j. The error of a token therefore does not
depend on the batch that it is computed in, on its padding, or on the number of threads. `rng` describes the generator;
`rng.normal` gives the same eps by themselves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .backend import DTYPES, Kernels, can_write, kernels_for, may_use_triton, thread_count, uses_triton
from .memory import empty_like
from .rng import Key, key_of, normal_rows, signed

_LARGEST = torch.finfo(torch.float32).max
_CHUNK = 1 << 15  # draws that the torch path makes at a time


def matmul_noise(
    y: Float[Tensor, "*rows columns"],
    relative_std: float,
    key: Key,
    *,
    rows: Int[Tensor, "*rows"] | None = None,
    column_start: Int[Tensor, "*rows"] | None = None,
    bias: Float[Tensor, " columns"] | None = None,
    out: Float[Tensor, "*rows columns"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """Add relative Gaussian error to a matrix product: `y + relative_std * |y| * eps`, with eps ~ N(0, 1).

    Args:
        y: the product, float32, bfloat16 or float16. The sum is computed in float32 and rounded once to this dtype.
        relative_std: standard deviation of the relative error (fraction; 5 % is 0.05); 0 returns exactly `y`.
        key: key of this product's draws.
        rows: identity of each row, int64; the default counts the rows from 0.
        column_start: logical index of each row's first column, int64; default 0. It may be negative, so that left
            padding does not shift the draws.
        bias: added after the noise, in the dtype of `y`: it is not part of the product.
        out: where to write; may be `y`.

    Raises:
        TypeError, ValueError: if an argument cannot be used; nothing has been written then.
    """
    _check(y, relative_std, key, bias, out)
    if bias is not None and out is not None and _share_memory(bias, out):
        bias = bias.clone()  # it may lie where the result is written
    ids = None if rows is None else _flat_index("rows", rows, y)
    first = None if column_start is None else _flat_index("column_start", column_start, y)
    if relative_std == 0 or y.numel() == 0:
        with torch.no_grad():
            out = y.clone() if out is None else out.copy_(y)
            return out if bias is None else out.add_(bias)
    if may_use_triton(y):
        with torch.no_grad():
            return _on_device(y, relative_std, key, ids, first, bias, out)
    if bias is not None:
        with torch.no_grad():
            return matmul_noise(y, relative_std, key, rows=rows, column_start=column_start, out=out).add_(bias)
    kernels = kernels_for(y)
    if kernels is not None and y.dtype is torch.float16:  # which the kernels do not know
        with torch.no_grad():
            noisy = matmul_noise(y.to(torch.float32), relative_std, key, rows=rows, column_start=column_start)
            return noisy.to(torch.float16) if out is None else out.copy_(noisy)
    if kernels is not None and y.is_contiguous() and (out is None or can_write(out, y)):
        return _compiled(kernels, y, relative_std, key, ids, first, out)
    with torch.no_grad():
        flat = y.reshape(-1, y.shape[-1])
        if kernels is not None:
            result = _compiled(kernels, flat.contiguous(), relative_std, key, ids, first, None)
        else:
            result = _torch(flat, relative_std, key, ids, first)
        return result.reshape(y.shape) if out is None else out.copy_(result.reshape(y.shape))


def _compiled(
    kernels: Kernels, y: Tensor, s: float, key: Key, ids: Tensor | None, first: Tensor | None, out: Tensor | None
) -> Tensor:
    """The compiled path, on contiguous memory."""
    if out is None:
        out = empty_like(y)
    elif not out.is_inference():
        torch.autograd.graph.increment_version(out)
    count, columns = y.numel(), y.shape[-1]
    kernels.noise(
        0 if y.dtype is torch.float32 else 1,
        y.data_ptr(),
        out.data_ptr(),
        count // columns,
        columns,
        None if ids is None else ids.data_ptr(),
        None if first is None else first.data_ptr(),
        s,
        key.value,
        thread_count(count),
    )
    return out


def _on_device(
    y: Tensor,
    s: float,
    key: Key,
    ids: Tensor | None,
    first: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The path on a GPU or NPU: one operator on contiguous memory."""
    flat = y.reshape(-1, y.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    if torch.compiler.is_compiling():
        result = torch.ops.roundoff.noise(flat, s, signed(key), ids, first, bias)
    elif out is not None and y.is_contiguous() and can_write(out, y):
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
        _launched(flat, s, key, ids, first, bias, out.view(flat.shape))
        return out
    else:
        result = _launched(flat, s, key, ids, first, bias, None)
    result = result.reshape(y.shape)
    return result if out is None else out.copy_(result)


def _launched(
    flat: Tensor,
    s: float,
    key: Key,
    ids: Tensor | None,
    first: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Noise and bias on contiguous rows by Triton's kernel, if it can be used."""
    if uses_triton(flat):
        from .triton_kernels import launch

        out = torch.empty_like(flat) if out is None else out
        launch.noise(flat, out, s, key.value, ids, first, bias)
        return out
    result = _torch(flat, s, key, ids, first)
    if bias is not None:
        result += bias
    return result if out is None else out.copy_(result)


@torch.library.custom_op(
    "roundoff::noise",
    mutates_args=(),
    schema="(Tensor y, float s, int key, Tensor? ids, Tensor? starts, Tensor? bias) -> Tensor",
)
def _operator(y: Tensor, s: float, key: int, ids: Tensor | None, starts: Tensor | None, bias: Tensor | None) -> Tensor:
    return _launched(y, s, key_of(key), ids, starts, bias, None)


@_operator.register_fake
def _(y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _torch(flat: Tensor, s: float, key: Key, ids: Tensor | None, first: Tensor | None) -> Tensor:
    """The torch path on rows [rows, columns], one cache-sized piece at a time."""
    count, columns = flat.shape
    if ids is None:
        ids = torch.arange(count, device=flat.device)
    if first is None:
        first = torch.zeros_like(ids)
    result = torch.empty_like(flat, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // columns)
    for start in range(0, count, step):
        part = flat[start : start + step].to(torch.float32)
        eps = normal_rows(key, ids[start : start + step], first[start : start + step], columns)
        result[start : start + step] = part + part.abs().mul_(s).mul_(eps)
    return result


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may overlap; a graph (`torch.compile`) keeps them apart by itself."""
    return not torch.compiler.is_compiling() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _check(y: Tensor, relative_std: float, key: object, bias: Tensor | None, out: Tensor | None) -> None:
    """Refuse arguments that cannot be used."""
    if not isinstance(y, Tensor) or y.dtype not in DTYPES:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"matmul_noise takes a float32, bfloat16 or float16 tensor, but got {kind}")
    if y.dim() == 0:
        raise ValueError("matmul_noise takes a product [..., N], but got a scalar tensor")
    if not 0 <= relative_std <= _LARGEST:
        raise ValueError(
            f"relative_std must be finite and not negative (5 % is 0.05) in float32, but is {relative_std}"
        )
    if not isinstance(key, Key):
        raise TypeError(f"matmul_noise draws by a Key (Key.from_seed(0)), but got {key!r}")
    if bias is not None and (bias.dtype is not y.dtype or bias.shape != y.shape[-1:]):
        raise ValueError(
            f"bias must be {y.dtype} of shape {tuple(y.shape[-1:])} like the rows of y, "
            f"but is {bias.dtype} of shape {tuple(bias.shape)}"
        )
    if out is not None and out is not y and (out.shape != y.shape or out.dtype != y.dtype or out.device != y.device):
        raise ValueError(f"out must be like y ({y.dtype}, {tuple(y.shape)}), but is {out.dtype}, {tuple(out.shape)}")


def _flat_index(name: str, index: Tensor, y: Tensor) -> Tensor:
    """Row ids or first columns of `y` as a contiguous vector [rows]."""
    if index.dtype is not torch.int64 or index.shape != y.shape[:-1] or index.device != y.device:
        raise ValueError(
            f"{name} must be int64 of shape {tuple(y.shape[:-1])} on {y.device}, "
            f"but is {index.dtype} of shape {tuple(index.shape)} on {index.device}"
        )
    return index.reshape(-1).contiguous()
