"""The random draws of a forward pass, under one key: the hardware's noise and the dropout of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.hardware import installed, noise_key
from roundoff.models.keyed_dropout import dropout_draws
from roundoff.numerics.rng import Key


@contextmanager
def noise_context(
    model: PreTrainedModel,
    key: Key | None,
    rows: Int[Tensor, "rollouts columns"] | None,
    real: Bool[Tensor, "rollouts columns"] | None = None,
) -> Iterator[None]:
    """Inside the block, the hardware and the adapters' dropout draw by `key` and the row ids `rows`.

    `real` says which tokens are no padding, for hardware that quantizes gradients along the tokens; None means all.
    Without a key the block changes nothing.
    """
    if key is None:
        yield
        return
    hardware = nullcontext() if installed(model) is None else noise_key(model, key, rows, real=real)
    with dropout_draws(model, key, rows), hardware:
        yield


def is_noisy(model: PreTrainedModel) -> bool:
    """Whether two passes over one input can differ because the installed hardware is on and draws noise."""
    state = installed(model)
    return state is not None and state.is_on and state.hardware.is_noisy
