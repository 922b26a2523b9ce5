"""Dropout on LoRA's inputs with masks that can be replayed: drawn by key, module and row id, like the hardware's noise.

The key of a pass determines its masks. Dropout is off in rollouts and evaluations, and on in the passes of an update.
With `ratio = "replayed"`, old and new log-probabilities use the same masks, so that the ratio is still exactly 1 before
the first update; with `recomputed`, they use different ones. The reference policy has no adapter and hence no dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roundoff.numerics.rng import Key, uniform

MARK = "lora_dropout_draws"
"""Attribute of a model with dropout that holds its `DropoutDraws`."""


@dataclass(eq=False, slots=True)
class DropoutDraws:
    """State shared by all dropout modules of a model: what they draw by, and whether they are on."""

    key: Key | None = None
    rows: Int[Tensor, "rollouts columns"] | None = None
    """Row id of each token of the pass, int64."""
    on: bool = False

    def as_now(self) -> AbstractContextManager[None]:
        """A block, to be entered once and later, in which this state is what it is at this call."""
        then = self.key, self.rows, self.on

        @contextmanager
        def entered() -> Iterator[None]:
            before = self.key, self.rows, self.on
            self.key, self.rows, self.on = then
            try:
                yield
            finally:
                self.key, self.rows, self.on = before

        return entered()


def draws_of(model: nn.Module) -> DropoutDraws | None:
    """The state that the model's dropout modules share; None if it has none."""
    draws: DropoutDraws | None = model.__dict__.get(MARK)
    return draws


class KeyedDropout(nn.Module):
    """Zeroes each element with probability `share` and scales the others by `1 / (1 - share)`."""

    def __init__(self, share: float, name: str, draws: DropoutDraws) -> None:
        super().__init__()
        self.share, self.name = share, name
        self.__dict__["draws"] = draws

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` [rollouts, columns, in_features] after dropout, or unchanged while dropout is off.

        Raises:
            RuntimeError: if dropout is on, but no key and row ids are set.
            ValueError: if `x` does not hold one vector per token.
        """
        draws: DropoutDraws = self.__dict__["draws"]
        if not draws.on:
            return x
        if draws.key is None or draws.rows is None:
            raise RuntimeError("dropout is on, but the pass has no key and row ids to draw by")
        rows = draws.rows
        if x.dim() != 3 or x.shape[0] != rows.shape[0] or x.shape[1] > rows.shape[1]:
            raise ValueError(
                f"{self.name}: lora.dropout needs one input vector per token, but the shape is {list(x.shape)} for "
                f"{list(rows.shape)} tokens: set lora.dropout = 0 or leave this module out of lora.targets"
            )
        rows = rows[:, rows.shape[1] - x.shape[1] :]  # an output layer receives only the last tokens
        kept = uniform(draws.key.fold(self.name, "dropout"), x.shape, rows=rows, device=x.device) >= self.share
        return torch.where(kept, x / (1 - self.share), 0.0)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        return f"share={self.share}"


def is_dropping(model: nn.Module) -> bool:
    """Whether the model has dropout and it is on."""
    draws = draws_of(model)
    return draws is not None and draws.on


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Inside the block, dropout is on, as the passes of an update need it. No effect on a model without dropout."""
    draws = draws_of(model)
    if draws is None:
        yield
        return
    before, draws.on = draws.on, True
    try:
        yield
    finally:
        draws.on = before


@contextmanager
def dropout_draws(model: nn.Module, key: Key, rows: Int[Tensor, "rollouts columns"] | None) -> Iterator[None]:
    """Inside the block, dropout draws by `key` and the row ids `rows`. No effect on a model without dropout."""
    draws = draws_of(model)
    if draws is None:
        yield
        return
    before = draws.key, draws.rows
    draws.key, draws.rows = key, rows
    try:
        yield
    finally:
        draws.key, draws.rows = before
