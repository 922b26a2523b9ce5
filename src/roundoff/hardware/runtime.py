"""State that all layers of one installed model share while it runs, and the blocks that change it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from roundoff.config import Phase
from roundoff.hardware.draw import Draw
from roundoff.hardware.freshness import Freshness
from roundoff.numerics.rng import Key

_OTHER_THREAD = (
    "another thread is inside noise_key, hardware_off or hardware_phase of the same model, which apply to all of its "
    "products: give each thread a copy of the model (copy.deepcopy), or use a lock"
)


@dataclass(eq=False, slots=True)
class Block:
    """An open `noise_key` or `hardware_off` block, and the state that it restores.

    Blocks inside unfinished generators may be closed in any order. A block that is not the innermost of its kind
    changes nothing when it closes: it passes the state that it would restore to the next block inside it.
    """

    kind: str
    """`noise_key`, `hardware_off` or `hardware_phase`."""
    before: Any
    """State before the block: the draw, whether the hardware was on, or the phase."""


@dataclass(eq=False, slots=True)
class Runtime:
    """State that all layers of one installed model share while it runs."""

    seed_key: Key
    """Key of the draws outside of `noise_key`."""
    on: bool = True
    """Whether the hardware is on (outside of `hardware_off`)."""
    phase: Phase = "training"
    """The phase whose arithmetic is in force: that of the innermost open `hardware_phase`, training outside of it."""
    draw: Draw | None = None
    """Draw of the innermost open `noise_key`."""
    knew_padding: bool = False
    """Whether the last forward pass was told which tokens are padding; tracked where gradients are quantized or
    summed by an accumulator."""
    replaying: bool = False
    """Whether a layer is being computed again with the call counters of its first computation (gradient
    checkpointing)."""
    shared: tuple[object, int, str, Tensor] | None = None
    """The last quantized activation, as (weak reference to x, its version, format, Q(x)): the projections q, k and v
    see the same x."""
    calls: dict[str, int] = field(default_factory=dict)
    """Number of products drawn without `noise_key` so far, by module name."""
    owner: weakref.ref[Any] | None = None
    """The `InstalledHardware` that this state belongs to."""
    thread: int | None = None
    """The thread that opened a block (`Block`); None if none is open."""
    blocks: list[Block] = field(default_factory=list)
    """The open blocks, in the order in which they were entered."""
    freshness: Freshness = field(default_factory=Freshness)
    """Detector of writes to weights that torch does not count."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy (deepcopy, pickle): without activations, and without blocks that it would never leave.

        Raises:
            RuntimeError: inside `hardware_phase`, if phases differ: the copy's modules would stay in this one.
        """
        owner = self.owner() if self.owner is not None else None
        inside = any(block.kind == "hardware_phase" for block in self.blocks)
        if inside and owner is not None and len(set(map(id, owner.phases.values()))) > 1:
            raise RuntimeError("a model cannot be copied inside hardware_phase: leave the block first")
        state: dict[str, Any] = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        state |= dict.fromkeys(("shared", "draw", "owner", "thread"))
        state |= {"freshness": Freshness(), "blocks": []}
        for name, kind in (("on", "hardware_off"), ("phase", "hardware_phase")):
            state[name] = next((block.before for block in self.blocks if block.kind == kind), state[name])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """Copy the runtime with a copy of the whole model; the copy of a part keeps the runtime of its model.

        PEFT replaces single modules of an installed model with copies (`modules_to_save`), and `hardware_off` and
        `noise_key` of the model must reach those.
        """
        owner = self.owner() if self.owner is not None else None
        if owner is not None and id(owner.model) not in memo:
            return self
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "calls": dict(self.calls)})
        return copied

    @contextmanager
    def block(self, kind: str, before: Any, put: Callable[[Any], None], value: Any) -> Iterator[None]:
        """A block inside which `put(value)` holds; it ends with `put` of the state `before` it (see `Block`).

        Raises:
            RuntimeError: as `enter` does.
        """
        opened = self.enter(kind, before)
        put(value)
        try:
            yield
        finally:
            if self.leave(opened):
                put(opened.before)

    def enter(self, kind: str, before: Any) -> Block:
        """Open a block; `before` is the state that it restores.

        Raises:
            RuntimeError: if another thread is inside a block, because this one would silently change its products.
        """
        if self.thread not in (None, threading.get_ident()):
            raise RuntimeError(f"{kind} was entered while {_OTHER_THREAD}")
        self.thread = threading.get_ident()
        self.blocks.append(Block(kind, before))
        return self.blocks[-1]

    def leave(self, block: Block) -> bool:
        """Close a block; true if it was the innermost of its kind, so that the caller must restore `block.before`."""
        place = self.blocks.index(block)
        del self.blocks[place]
        if not self.blocks:
            self.thread = None
        inner = next((later for later in self.blocks[place:] if later.kind == block.kind), None)
        if inner is not None:
            inner.before = block.before
        return inner is None

    def check_thread(self, name: str) -> None:
        """Check, before a product, that no other thread has a block open; a backward pass may run in its own thread.

        Raises:
            RuntimeError: if another thread has.
        """
        if self.thread not in (None, threading.get_ident()) and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(f"{name} was computed while {_OTHER_THREAD}")

    def check_padding(self, name: str) -> None:
        """Check that a recomputation (gradient checkpointing) knows which tokens are padding if the forward pass did.

        Raises:
            RuntimeError: if it does not, because padding would enter the blocks of quantized gradients.
        """
        if torch._C._current_graph_task_id() == -1:
            self.knew_padding = self.draw is not None and self.draw.real is not None
        elif self.draw is None and self.knew_padding:
            raise RuntimeError(
                f"{name} is recomputed in the backward pass outside of noise_key, so it does not know which tokens are "
                "padding: keep noise_key open until backward() is done, or use no gradient checkpointing"
            )

    def current(self, name: str) -> Draw:
        """The draw for the next product of a module: that of `noise_key`, or outside of it the module's next own one.

        Raises:
            RuntimeError: if this is a recomputation (gradient checkpointing) that would draw different noise, or if
                another thread is inside a block of this model.
            ConfigError: if the model's attention was switched to another function.
        """
        self.check_thread(name)
        if self.draw is not None:
            self.draw.note(name)
            return self.draw
        if torch._C._current_graph_task_id() != -1 and not self.replaying:
            raise RuntimeError(
                f"{name} is recomputed in the backward pass outside of noise_key, so its noise would differ from the "
                "forward pass: keep noise_key open until backward() is done, checkpoint by "
                "roundoff.models.gradient_checkpointing, or use no gradient checkpointing"
            )
        owner = self.owner() if self.owner is not None else None
        if owner is not None:
            owner.check_switches()
        count = self.calls.get(name, 0)
        self.calls[name] = count + 1
        return Draw(self.seed_key.fold("call", count), None)
