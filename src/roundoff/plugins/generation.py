"""The `generate` of one model object, run inside blocks that several owners put around it: a phase, AQN, or both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from roundoff.config import ConfigError

Block = Callable[[nn.Module], AbstractContextManager[Any]]
"""Opens the block in which one call of `generate` runs; the model tells whether it is a rollout or an evaluation."""


class EnclosedGenerate:
    """Takes the place of a model's `generate`. A copy of the model (deepcopy) generates with the copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.plain: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self.blocks: dict[str, Block] = {}
        """The blocks by the names of their owners, the outermost first."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Generate inside all blocks, with the arguments and the result of the model's own method."""
        with ExitStack() as stack:
            for block in self.blocks.values():
                stack.enter_context(block(self.model))
            return self.plain(*inputs, **named)


def enclosed(model: nn.Module) -> EnclosedGenerate | None:
    """What takes the place of a model's `generate`; None if nothing does.

    Raises:
        ConfigError: if something else has replaced `generate` on this object.
    """
    found = vars(model).get("generate")
    if found is None or isinstance(found, EnclosedGenerate):
        return found
    raise ConfigError(
        f"generate of this model was replaced by {type(found).__name__} {getattr(found, '__name__', '')}".rstrip()
        + ", which roundoff can neither enclose nor put back: remove it first (del model.generate)"
    )


def enclose(model: nn.Module, owner: str, block: Block) -> None:
    """Run every later `generate` of a model inside a block, in addition to those that others put around it.

    Raises:
        ConfigError: if this owner has a block there already, or something else has replaced `generate`.
    """
    there = enclosed(model)
    if there is None:
        there = EnclosedGenerate(model)
        model.generate = there  # type: ignore[assignment]
    if owner in there.blocks:
        raise ConfigError(f"generate of this model is wrapped already: give the trainer one {owner}")
    there.blocks[owner] = block


def release(model: nn.Module, owner: str) -> bool:
    """Take a block away, and say whether it was there; with the last one, the model has its own method again."""
    found = vars(model).get("generate")
    if not isinstance(found, EnclosedGenerate) or owner not in found.blocks:
        return False
    del found.blocks[owner]
    if not found.blocks:
        del vars(model)["generate"]
    return True
