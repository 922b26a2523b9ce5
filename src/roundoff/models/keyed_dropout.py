"""Dropout of LoRA's inputs whose masks can be replayed: drawn by key, module and row id, like the hardware's noise.

A mask belongs to the key of its pass. In rollouts and evaluations dropout is off. In the passes of an update it is on,
and with `ratio = "replayed"` old and new log-probabilities meet the same masks, so that the ratio is still exactly 1
before the first update; with `recomputed` they meet different ones. The reference policy has no adapter, hence no
dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundoff.numerics.rng import Key, uniform

MARK = "lora_dropout_draws"
"""Attribute of a model with dropout that holds its `DropoutDraws`."""


@dataclass(eq=False, slots=True)
class DropoutDraws:
    """What all dropout modules of a model draw by."""

    key: Key | None = None
    rows: Tensor | None = None
    """[N, S] int64: identity of each token of the pass."""
    on: bool = False

    def as_now(self) -> AbstractContextManager[None]:
        """A block, to be entered once and later, in which draws are made as they would be at this call."""
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
    """What the dropout of a model draws by; None on a model without it."""
    found: DropoutDraws | None = model.__dict__.get(MARK)
    return found


class KeyedDropout(nn.Module):
    """Zeroes each element with probability `share` and scales the others by `1 / (1 - share)`."""

    def __init__(self, share: float, name: str, draws: DropoutDraws) -> None:
        super().__init__()
        self.share, self.name = share, name
        self.__dict__["draws"] = draws

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, S, K], as it is unless dropout is on."""
        draws: DropoutDraws = self.__dict__["draws"]
        if not draws.on:
            return x
        if draws.key is None or draws.rows is None:
            raise RuntimeError("dropout is on, but the pass has no key and row ids to draw by")
        rows = draws.rows
        if x.dim() != 3 or x.shape[0] != rows.shape[0] or x.shape[1] > rows.shape[1]:
            raise ValueError(
                f"{self.name}: lora.dropout needs an input of one vector a token, but its shape is {list(x.shape)} for "
                f"{list(rows.shape)} tokens: set lora.dropout = 0 or leave this module out of lora.targets"
            )
        rows = rows[:, rows.shape[1] - x.shape[1] :]  # an output layer is given the last tokens alone
        kept = uniform(draws.key.fold(self.name, "dropout"), x.shape, rows=rows, device=x.device) >= self.share
        return torch.where(kept, x / (1 - self.share), 0.0)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"share={self.share}"


def is_dropping(model: nn.Module) -> bool:
    """Whether dropout is in force on the model."""
    draws = draws_of(model)
    return draws is not None and draws.on


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Dropout in force inside, for the passes of an update; nothing on a model without it."""
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
def dropout_draws(model: nn.Module, key: Key, rows: Tensor | None) -> Iterator[None]:
    """Dropout inside draws by `key` and row ids [N, S]; nothing on a model without it."""
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
