"""Relative Gaussian error of a matrix product: `y + s * |y| * eps`, with eps replayable from a key.

`eps[r, j]` depends only on the key, the id of row r and the logical column j. The error of a token therefore does not
depend on the batch that it is computed in, on its padding, or on the number of threads. `rng` describes the generator;
`rng.normal` gives the same eps by themselves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .backend import Kernels, can_write, kernels_for, thread_count
from .memory import empty_like
from .rng import Key, normal_rows

_LARGEST = torch.finfo(torch.float32).max
_CHUNK = 1 << 15  # draws that the torch path makes at a time


def matmul_noise(
    y: Float[Tensor, "*rows columns"],
    relative_std: float,
    key: Key,
    *,
    rows: Int[Tensor, "*rows"] | None = None,
    column_start: Int[Tensor, "*rows"] | None = None,
    out: Float[Tensor, "*rows columns"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """Add relative Gaussian error to a matrix product: `y + relative_std * |y| * eps`, with eps ~ N(0, 1).

    Args:
        y: the product, float32 or bfloat16. The sum is computed in float32 and rounded once to this dtype.
        relative_std: standard deviation of the relative error (fraction; 5 % is 0.05); 0 returns exactly `y`.
        key: key of this product's draws.
        rows: identity of each row, int64; the default counts the rows from 0.
        column_start: logical index of each row's first column, int64; default 0. It may be negative, so that left
            padding does not shift the draws.
        out: where to write; may be `y`.

    Raises:
        TypeError, ValueError: if an argument cannot be used; nothing has been written then.
    """
    _check(y, relative_std, key, out)
    ids = None if rows is None else _flat_index("rows", rows, y)
    first = None if column_start is None else _flat_index("column_start", column_start, y)
    if relative_std == 0 or y.numel() == 0:
        with torch.no_grad():
            return y.clone() if out is None else out.copy_(y)
    kernels = kernels_for(y)
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


def _check(y: Tensor, relative_std: float, key: object, out: Tensor | None) -> None:
    """Refuse arguments that cannot be used."""
    if not isinstance(y, Tensor) or (y.dtype is not torch.float32 and y.dtype is not torch.bfloat16):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"matmul_noise takes a float32 or bfloat16 tensor, but got {kind}")
    if y.dim() == 0:
        raise ValueError("matmul_noise takes a product [..., N], but got a scalar tensor")
    if not 0 <= relative_std <= _LARGEST:
        raise ValueError(
            f"relative_std must be finite and not negative (5 % is 0.05) in float32, but is {relative_std}"
        )
    if not isinstance(key, Key):
        raise TypeError(f"matmul_noise draws by a Key (Key.from_seed(0)), but got {key!r}")
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
