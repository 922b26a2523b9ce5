"""The random draws of a forward pass, under one key: the hardware's noise and the dropout of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.hardware import installed, noise_key
from roundoff.models.keyed_dropout import dropout_draws
from roundoff.numerics.rng import Key
from roundoff.numerics.transfer import put


@contextmanager
def noise_context(
    model: PreTrainedModel,
    key: Key | None,
    rows: Int[Tensor, "rollouts columns"] | None,
    column: Int[Tensor, ""] | None = None,
    real: Bool[Tensor, "rollouts columns"] | None = None,
) -> Iterator[None]:
    """Inside the block, the hardware and the adapters' dropout draw by `key` and the row ids `rows`.

    Without a key the block changes nothing. Row ids in host memory are copied to the model's device; a backward pass
    over them then does not wait for the device. `column` is the cache's column of the last token, and `real` says which
    tokens are no padding (`noise_key`).
    """
    if key is None:
        yield
        return
    there = None if rows is None else put(rows, model.device)
    host = rows if rows is not None and rows.is_cpu else None
    hardware: AbstractContextManager[None] = nullcontext()
    if installed(model) is not None:
        hardware = noise_key(model, key, there, host=host, column=column, real=real)
    with dropout_draws(model, key, there), hardware:
        yield


def is_noisy(model: PreTrainedModel) -> bool:
    """Whether two passes over one input can differ because the installed hardware is on and draws noise."""
    state = installed(model)
    return state is not None and state.is_on and state.in_force.hardware.is_noisy
