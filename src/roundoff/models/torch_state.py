"""Torch's global defaults while a model is made: what another library has set must not reach its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_defaults() -> Iterator[None]:
    """Inside, tensors are float32 on the CPU unless their maker says otherwise; what was set before is restored.

    Inference mode is left, too: parameters that are made in it could never be trained.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
