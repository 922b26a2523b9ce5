"""Relative Gaussian error of a matrix product: `y + s * |y| * eps`, with eps replayable from a key.

`eps[r, j]` depends on the key, the id of row r and the logical column of j only, so that the error of a token does not
depend on the batch it is computed in, on its padding, or on how many threads work. See `rng` for the generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import Kernels, can_write, kernels_for, thread_count
from .rng import Key, normal, normal_rows

_LARGEST = torch.finfo(torch.float32).max
_CHUNK = 1 << 15  # draws made at a time by the pure-torch path


def matmul_noise(
    y: Tensor,
    relative_std: float,
    key: Key,
    *,
    rows: Tensor | None = None,
    column_start: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y + s * |y| * eps` for a product `y` [..., N]; s is `relative_std`, a fraction (5 % is 0.05).

    Args:
        y: the product, float32 or bfloat16; computed in float32 and rounded once to its dtype.
        relative_std: standard deviation of the relative error; 0 returns exactly `y`.
        key: key of this product's draws.
        rows: identity of each row, int64 [...]; default 0..R-1.
        column_start: logical index of the first column of each row, int64 [...]; default 0, may be negative (so that
            left padding does not shift the draws).
        out: where to write; may be `y`.

    Raises:
        TypeError, ValueError: before anything is written.
    """
    _check(y, relative_std, key, out)
    ids = None if rows is None else _index("rows", rows, y)
    first = None if column_start is None else _index("column_start", column_start, y)
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
    """The kernel on contiguous memory."""
    if out is None:
        out = torch.empty_like(y)
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
    """Plain torch on rows [R, N], a cache-sized piece at a time."""
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


def gaussian(
    key: Key,
    shape: Sequence[int],
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers [..., N], keyed by (row id, column) like the eps of `matmul_noise`."""
    return normal(key, shape, dtype=dtype, rows=rows, device=device)


def _check(y: Tensor, relative_std: float, key: object, out: Tensor | None) -> None:
    """Refuse what cannot be computed."""
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


def _index(name: str, index: Tensor, y: Tensor) -> Tensor:
    """Row ids or first columns, contiguous."""
    if index.dtype is not torch.int64 or index.shape != y.shape[:-1] or index.device != y.device:
        raise ValueError(
            f"{name} must be int64 of shape {tuple(y.shape[:-1])} on {y.device}, "
            f"but is {index.dtype} of shape {tuple(index.shape)} on {index.device}"
        )
    return index.reshape(-1).contiguous()
