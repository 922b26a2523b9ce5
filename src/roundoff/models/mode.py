"""Evaluation mode: a property of every module, not of the model's root.

PEFT's adapters begin in training mode within a model in evaluation mode, and `model.training` does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No module of the model is in training mode inside (no dropout); each has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
