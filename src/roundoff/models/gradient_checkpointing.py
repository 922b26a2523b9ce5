"""Gradient checkpointing: the forward pass keeps each decoder layer's input, and backward recomputes the rest.

It takes about a third more time and changes no bit of loss or gradient: a recomputed layer meets the same noise, the
same dropout masks and the same hardware (on or off) as in the forward pass, even if backward runs outside the block
that set their keys. The layers of transformers support checkpointing, but only in training mode, in which attention
dropout would be active too. Inside the block, therefore, the layers themselves are in training mode and their
submodules are not.
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
    """Check that gradient checkpointing would have an effect.

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
    """Inside the block, forward passes keep only the inputs of the decoder layers for backward.

    Backward may run outside the block. Where gradients are off, the block changes nothing.
    """
    if not (enabled and torch.is_grad_enabled()):
        yield
        return
    hardware, draws = installed(model), draws_of(model)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts for the first computation of a layer and for the second, which restores the state of the first."""
        return nullcontext(), _current_state(hardware, draws)

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


def _current_state(hardware: InstalledHardware | None, draws: DropoutDraws | None) -> AbstractContextManager[Any]:
    """A block, to be entered later, in which hardware and dropout are in the state they have at this call."""
    contexts = [state.as_now() for state in (hardware, draws) if state is not None]

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    return entered()
