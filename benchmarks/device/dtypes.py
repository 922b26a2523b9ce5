"""The dtypes of tensors, and what an operation takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accepts(work: Callable[[torch.Tensor], object], dtype: torch.dtype = torch.float32) -> bool:
    """Whether an operation takes this dtype, with the arguments that it has."""
    try:
        work(torch.ones(1, 32, dtype=dtype))
    except (TypeError, ValueError):
        return False
    return True


def shown(dtype: torch.dtype) -> str:
    """The name of a dtype alone."""
    return str(dtype).removeprefix("torch.")
