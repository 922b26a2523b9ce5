"""Gradient checkpointing: the forward pass keeps the input of each decoder layer, and backward computes the rest again.

It costs about a third more time and changes no bit of loss or gradient: a layer that is computed again meets the same
noise, the same dropout masks and the same hardware (on or off) as the first time, also after the block that keyed them
was left. transformers' own layers do it, but only in training mode, in which they would drop attention weights, too;
so inside the block the layers themselves are in training mode, and nothing within them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from roundoff.config import ConfigError
from roundoff.hardware import InstalledHardware, installed
from roundoff.models.keyed_dropout import DropoutDraws, draws_of

_SWITCHED = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


def check_layers(model: nn.Module) -> None:
    """Check that gradient checkpointing would do something.

    Raises:
        ConfigError: if no layer of the model supports it.
    """
    if not _layers(model):
        raise ConfigError(
            f"training.gradient_checkpointing = true, but no layer of {type(model).__name__} supports it: set it to "
            "false"
        )


@contextmanager
def checkpointed(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Forward passes inside keep little for backward, which may run outside; nothing changes without gradients."""
    if not (enabled and torch.is_grad_enabled()):
        yield
        return
    found, draws = installed(model), draws_of(model)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the first computation of a layer, and around the second: how things stand now."""
        return nullcontext(), _again(found, draws)

    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    before = [(layer, {name: layer.__dict__.get(name) for name in _SWITCHED}) for layer in _layers(model)]
    try:
        for layer, _ in before:
            layer.__dict__.update(dict(zip(_SWITCHED, (True, function, True), strict=True)))
        yield
    finally:
        for layer, values in before:
            for name, value in values.items():
                if value is None:
                    del layer.__dict__[name]
                else:
                    layer.__dict__[name] = value


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _again(found: InstalledHardware | None, draws: DropoutDraws | None) -> AbstractContextManager[Any]:
    """A block in which hardware and dropout are as they are at this call."""
    contexts = [state.as_now() for state in (found, draws) if state is not None]

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    return entered()
