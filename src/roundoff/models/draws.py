"""The random draws of a forward pass: those of the hardware and those of the adapters' dropout, under one key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from roundoff.hardware import installed, noise_key
from roundoff.models.keyed_dropout import dropout_draws
from roundoff.numerics.rng import Key


@contextmanager
def noise_context(model: PreTrainedModel, key: Key | None, rows: Tensor | None) -> Iterator[None]:
    """Inside, the hardware and adapters' dropout draw by `key` and row ids [N, S]; without a key nothing changes."""
    if key is None:
        yield
        return
    hardware = nullcontext() if installed(model) is None else noise_key(model, key, rows)
    with dropout_draws(model, key, rows), hardware:
        yield


def is_noisy(model: PreTrainedModel) -> bool:
    """Whether two passes of the model over one input differ: hardware is in force, and it draws."""
    found = installed(model)
    return found is not None and found.is_on and found.hardware.is_noisy
