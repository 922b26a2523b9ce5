"""Evaluation mode, which is a property of every module and not only of the model's root.

PEFT's adapters start in training mode even inside a model in evaluation mode, and `model.training` does not show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block, no module is in training mode (no dropout); afterwards each module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
