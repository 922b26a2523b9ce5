"""Relative Gaussian error of a matrix product: `y + s * |y| * eps`, with eps replayable from a key.

`eps[r, j]` depends on the key, the id of row r and the logical column of j only, so that the error of a token does not
depend on the batch it is computed in, on its padding, or on how many threads work. See `rng` for the generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rng import Key, normal, normal_rows

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
    """`y + s * |y| * eps` for a product `y` [..., N] (float32 or bfloat16); s = `relative_std`, a fraction (5 % is 0.05).

    Args:
        y: the product; computed in float32 and rounded once to its dtype.
        relative_std: standard deviation of the relative error; 0 returns exactly `y`.
        key: key of this product's draws.
        rows: identity of each row, int64 [...]; default 0..R-1.
        column_start: logical index of the first column of each row, int64 [...]; default 0, may be negative (so that
            left padding does not shift the draws).
        out: where to write; may be `y`.

    Raises:
        TypeError, ValueError: before anything is written.
    """
    _check(y, relative_std, out)
    target = torch.empty_like(y, memory_format=torch.contiguous_format) if out is None else out
    if relative_std == 0 or y.numel() == 0:
        return target.copy_(y)
    columns = y.shape[-1]
    flat = y.reshape(-1, columns)
    count = flat.shape[0]
    ids = _index("rows", rows, y)
    first = _index("column_start", column_start, y)
    if ids is None:
        ids = torch.arange(count, device=y.device)
    if first is None:
        first = torch.zeros_like(ids)
    result = target if target.is_contiguous() else torch.empty_like(y, memory_format=torch.contiguous_format)
    flat_result = result.view(-1, columns)
    step = max(1, _CHUNK // columns)
    for start in range(0, count, step):
        part = flat[start : start + step].to(torch.float32)
        eps = normal_rows(key, ids[start : start + step], first[start : start + step], columns)
        flat_result[start : start + step] = part + part.abs().mul_(relative_std).mul_(eps)
    return target if result is target else target.copy_(result)


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


def _check(y: Tensor, relative_std: float, out: Tensor | None) -> None:
    """Refuse what cannot be computed."""
    if not isinstance(y, Tensor) or (y.dtype is not torch.float32 and y.dtype is not torch.bfloat16):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"matmul_noise takes a float32 or bfloat16 tensor, but got {kind}")
    if y.dim() == 0:
        raise ValueError("matmul_noise takes a product [..., N], but got a scalar tensor")
    if not (math.isfinite(relative_std) and relative_std >= 0):
        raise ValueError(f"relative_std must be finite and not negative (5 % is 0.05), but is {relative_std}")
    if out is not None and (out.shape != y.shape or out.dtype != y.dtype or out.device != y.device):
        raise ValueError(f"out must be like y ({y.dtype}, {tuple(y.shape)}), but is {out.dtype}, {tuple(out.shape)}")


def _index(name: str, index: Tensor | None, y: Tensor) -> Tensor | None:
    """Row ids or first columns as [R]."""
    if index is None:
        return None
    if index.dtype is not torch.int64 or index.shape != y.shape[:-1]:
        raise ValueError(
            f"{name} must be int64 of shape {tuple(y.shape[:-1])}, but is {index.dtype} of {tuple(index.shape)}"
        )
    return index.reshape(-1)
