"""The blocks that a model runs in: `hardware_off`, `plain_arithmetic`, `hardware_phase` and `noise_key`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from jaxtyping import Bool, Int
from torch import Tensor, nn

from roundoff.config import PHASES, Phase
from roundoff.hardware.draw import Draw
from roundoff.hardware.installed import installed, required
from roundoff.numerics.rng import Key


@contextmanager
def hardware_off(model: nn.Module) -> Iterator[None]:
    """Compute in plain arithmetic inside the block, with the exact bits of the same weights without hardware.

    Under gradient checkpointing the block must enclose `backward()` as well, which computes the forward pass again.

    Raises:
        ConfigError: if no hardware is installed, or the switches of this model do not reach all of its modules.
        RuntimeError: if another thread is inside a block of this model.
    """
    hardware = required(model)
    hardware.check_reach(model)
    with hardware.runtime.block("hardware_off", hardware.is_on, hardware.switch, False):
        yield


def plain_arithmetic(model: nn.Module) -> AbstractContextManager[None]:
    """`hardware_off` for a model that may have no hardware, which then computes as it is."""
    return nullcontext() if installed(model) is None else hardware_off(model)


@contextmanager
def hardware_phase(model: nn.Module, phase: Phase) -> Iterator[None]:
    """Compute on the hardware of a phase inside the block; outside of any, the hardware is that of training.

    A model without hardware computes as it is. Blocks may be nested; the innermost one applies. A backward pass belongs
    into the block of its forward pass.

    Raises:
        ConfigError: if the model's attention was switched to another function since.
        RuntimeError: if another thread is inside a block of this model.
        ValueError: if there is no such phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, but is {phase!r}")
    hardware = installed(model)
    if hardware is None:
        yield
        return
    hardware.check_switches()
    with hardware.runtime.block("hardware_phase", hardware.runtime.phase, hardware.enter_phase, phase):
        yield


def rollout_phase(model: nn.Module) -> AbstractContextManager[None]:
    """`hardware_phase` of rollouts, unless a block of `hardware_phase` is open already (that of an evaluation)."""
    hardware = installed(model)
    inside = hardware is not None and any(block.kind == "hardware_phase" for block in hardware.runtime.blocks)
    return nullcontext() if inside else hardware_phase(model, "rollout")


@contextmanager
def noise_key(
    model: nn.Module,
    key: Key,
    rows: Int[Tensor, "rollouts columns"] | None = None,
    *,
    host: Int[Tensor, "rollouts columns"] | None = None,
    column: Int[Tensor, ""] | None = None,
    real: Bool[Tensor, "_rollouts _columns"] | None = None,
) -> Iterator[None]:
    """Fix the noise of the forward pass inside the block: the same key and rows give the same bits.

    Every product draws from `key`, its own name and the row ids. Open one block for each forward pass, because a second
    pass over the same rows inside it would get the same noise. The backward pass uses the draws of its forward pass
    wherever it runs, but under gradient checkpointing, which computes the forward pass again, the block must stay open
    until `backward()` is done. Blocks may be nested; the innermost one applies.

    Args:
        model: the installed model, a part of it, or a wrapper.
        key: key of the pass.
        rows: identity of each token, int64: `rollout_id * POSITIONS + position`, with positions counted without
            padding. The tensor must not be changed afterwards. None: each product counts its rows from 0.
        host: the same row ids in host memory; without them, the noise of a weight gradient waits for the device.
        column: column of a static key-value cache that holds the last token; None: the last one.
        real: which tokens are no padding, in host memory, for hardware that quantizes gradients along the tokens or
            has an accumulator; None means all.

    Raises:
        ConfigError: if no hardware is installed, or the model's attention was switched to another function since.
        RuntimeError: if another thread is inside a block of this model.
        ValueError: if `rows` is not int64 or does not have two axes.
    """
    hardware = required(model)
    hardware.check_switches()
    runtime, draw = hardware.runtime, Draw(key, rows, host, column, real)
    with runtime.block("noise_key", runtime.draw, functools.partial(setattr, runtime, "draw"), draw):
        yield
