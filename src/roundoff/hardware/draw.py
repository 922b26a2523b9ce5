"""What the products of one forward pass draw their noise from: a key, and the identity of every token.

A draw is a function of (key, layer, product, row id, column). The row id of a token is
`rollout_id * 2**20 + position`, with positions counted without padding, so that a token's noise depends neither on the
batch it is computed in nor on its padding, and the training pass can replay the rollout's draws. Products without
token rows (`dW`) fold a fingerprint of the batch's row ids into their key instead.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from roundoff.errors import RoundoffWarning
from roundoff.hardware.freshness import Freshness
from roundoff.numerics.rng import Key

POSITIONS = 1 << 20
"""Row ids of one rollout: `row = rollout_id * POSITIONS + position`."""

_OTHER_THREAD = (
    "another thread is inside noise_key or hardware_off of the same model, which hold for all of its products: give "
    "each thread a copy of the model (copy.deepcopy), or use a lock"
)


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Row ids and first columns of the products of one attention layer; B batch, H heads, K key heads, Q, S tokens."""

    query: Tensor
    """[B, K, H/K * Q]: identity of each (query token, head)."""
    column_start: Tensor
    """[B, K, H/K * Q]: logical position of the first key, so that left padding does not shift the draws."""
    key: Tensor
    """[B, K, S]: identity of each (key token, key head)."""


class Draw:
    """Key and row ids [B, T] of one forward pass; rows may be None (then row ids count within the batch)."""

    __slots__ = ("_attention", "_drawn", "_fingerprint", "_tag", "_views", "key", "rows")

    def __init__(self, key: Key, rows: Tensor | None) -> None:
        if rows is not None and (rows.dtype is not torch.int64 or rows.dim() != 2):
            raise ValueError(f"rows must be int64 of shape [B, T], but is {rows.dtype} of shape {tuple(rows.shape)}")
        self.key = key
        self.rows = rows
        self._views: dict[tuple[int, ...], Tensor] = {}
        self._attention: dict[tuple[int, int, int, int, int], AttentionRows] = {}
        self._fingerprint: int | None = None
        self._tag: Tensor | None = None
        self._drawn: set[str] | None = set()

    def note(self, name: str) -> None:
        """Take down that a module draws from this; warn if one does so again, which adds one and the same noise twice.

        A backward pass (gradient checkpointing) rightly meets the noise of its forward pass.
        """
        if self._drawn is None or torch._C._current_graph_task_id() != -1:
            return
        if name not in self._drawn:
            self._drawn.add(name)
            return
        self._drawn = None  # once is enough
        warnings.warn(
            f"{name} is computed a second time inside of one noise_key block and meets the same noise as the first: "
            "one block is for one forward pass, and a module that a model calls twice in a pass should be two modules",
            RoundoffWarning,
            stacklevel=2,
        )

    @property
    def tag(self) -> Tensor:
        """The key, as a tensor that a product saves for its backward pass.

        Gradient checkpointing hands the backward pass what the second computation saved, so that this shows whether it
        drew from the same key.
        """
        if self._tag is None:
            self._tag = torch.tensor([self.key.value >> 32, self.key.value & 0xFFFFFFFF])
        return self._tag

    def check_tag(self, tag: Tensor, name: str) -> None:
        """Check that what a backward pass was given was drawn from this key.

        Raises:
            RuntimeError: if it was computed again (gradient checkpointing) inside another `noise_key`.
        """
        if tag is not self._tag and tag.tolist() != self.tag.tolist():
            raise RuntimeError(
                f"{name} was recomputed in the backward pass inside another noise_key than its forward pass: keep the "
                "noise_key of the forward pass open until backward() is done, and open no other in between"
            )

    @property
    def fingerprint(self) -> int:
        """64 bits that identify the row ids of this pass, for products that have no token rows; 0 without rows."""
        if self._fingerprint is None:
            data = b"" if self.rows is None else self.rows.cpu().contiguous().numpy().tobytes()
            digest = hashlib.blake2b(data, digest_size=8).digest()
            self._fingerprint = int.from_bytes(digest, "little") if data else 0
        return self._fingerprint

    def rows_of(self, leading: torch.Size, name: str, *, last: bool = False) -> Tensor | None:
        """Row ids in the shape of a product's leading axes: [B, T] or any reshape of it, such as [B * T].

        With `last` a product over [B, t], t < T, belongs to the last t tokens: what `logits_to_keep=t` gives an output
        embedding.

        Raises:
            ValueError: if the product does not see the B * T tokens of `noise_key`; guessing would be silently wrong.
        """
        if self.rows is None:
            return None
        view = self._views.get(leading)
        if view is not None:
            return view
        if leading.numel() == self.rows.numel():
            view = self.rows.reshape(leading)
        elif last and len(leading) == 2 and leading[0] == self.rows.shape[0] and leading[1] < self.rows.shape[1]:
            return self.rows[:, self.rows.shape[1] - leading[1] :]
        else:
            raise ValueError(
                f"{name} sees tokens of shape {tuple(leading)}, but noise_key was given rows of shape "
                f"{tuple(self.rows.shape)}: give one row id for each token of this forward pass, or exclude the module"
            )
        self._views[leading] = view
        return view

    def attention_rows(self, name: str, query: torch.Size, key: torch.Size) -> AttentionRows | None:
        """Row ids of the products of an attention layer with queries [B, H, Q, D] and keys [B, K, S, D]."""
        if self.rows is None:
            return None
        batch, heads, queries, _ = query
        groups, keys = key[1], key[2]
        shape = (batch, heads, queries, groups, keys)
        found = self._attention.get(shape)
        if found is None:
            if self.rows.shape != (batch, queries):
                raise ValueError(
                    f"{name} has queries of {batch} x {queries} tokens, but noise_key was given rows of shape "
                    f"{tuple(self.rows.shape)}: give one row id for each token of this forward pass"
                )
            found = self._attention[shape] = _attention_rows(self.rows, heads, groups, keys)
        return found


def _attention_rows(rows: Tensor, heads: int, groups: int, keys: int) -> AttentionRows:
    """See `AttentionRows`. The keys end with the last query's token, as they do in a growing or sliding cache."""
    batch, queries = rows.shape
    columns = torch.arange(keys - queries, keys, device=rows.device)
    start = rows % POSITIONS - columns  # [B, Q]: logical position of the first key
    if keys == queries:
        key_rows = rows
    else:  # the last query is a real token under left padding
        rollout = rows[:, -1:] - rows[:, -1:] % POSITIONS
        key_rows = rollout + start[:, -1:] + torch.arange(keys, device=rows.device)
    head_ids = torch.arange(heads, device=rows.device)[:, None]
    shape = (batch, groups, heads // groups * queries)
    return AttentionRows(
        query=(rows[:, None] * heads + head_ids).reshape(shape),
        column_start=start[:, None].expand(batch, heads, queries).reshape(shape),
        key=key_rows[:, None] * groups + torch.arange(groups, device=rows.device)[:, None],
    )


@dataclass(eq=False, slots=True)
class Block:
    """An open `noise_key` or `hardware_off` block, and what it restores.

    Blocks of generators that were left open are closed in any order. A block that is not the innermost of its kind
    leaves what is in force as it is, and hands what it would restore to the one opened after it.
    """

    kind: str
    """`noise_key` or `hardware_off`."""
    before: Any
    """The draw, or whether the hardware was in force."""


@dataclass(eq=False, slots=True)
class Runtime:
    """State that all layers of one installed model share while it runs."""

    seed_key: Key
    on: bool = True
    draw: Draw | None = None
    replaying: bool = False
    """Whether a layer is computed again under the call counters of the first time (gradient checkpointing)."""
    shared: tuple[object, int, str, Tensor] | None = None
    """The last quantized activation (weak reference to x, its version, format, Q(x)): q, k and v see the same x."""
    calls: dict[str, int] = field(default_factory=dict)
    """Products drawn without `noise_key` so far, by module name."""
    owner: weakref.ref[Any] | None = None
    """The `InstalledHardware` that this is the state of."""
    thread: int | None = None
    """The thread that opened `noise_key` or `hardware_off`; None outside of them."""
    blocks: list[Block] = field(default_factory=list)
    """The open ones, in the order in which they were entered."""
    freshness: Freshness = field(default_factory=Freshness)
    """What notices writes to weights that torch does not count."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy (deepcopy, pickle) takes over: no activation, and nothing of a block that it will never leave."""
        own: dict[str, Any] = dict.fromkeys(("shared", "draw", "owner", "thread")) | {
            "freshness": Freshness(),
            "blocks": [],
        }
        own["on"] = next((block.before for block in self.blocks if block.kind == "hardware_off"), self.on)
        return {slot.name: getattr(self, slot.name) for slot in fields(self)} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the whole model has a runtime of its own; a copy of a part stays with the model it came from.

        PEFT copies single modules of an installed model and puts the copies in their place (`modules_to_save`):
        `hardware_off` and `noise_key` of the model must reach those.
        """
        found = self.owner() if self.owner is not None else None
        if found is not None and id(found.model) not in memo:
            return self
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "calls": dict(self.calls)})
        return copied

    def enter(self, kind: str, before: Any) -> Block:
        """Enter a block.

        Raises:
            RuntimeError: if another thread is inside of one: its products would silently follow this one.
        """
        if self.thread not in (None, threading.get_ident()):
            raise RuntimeError(f"{kind} was entered while {_OTHER_THREAD}")
        self.thread = threading.get_ident()
        self.blocks.append(Block(kind, before))
        return self.blocks[-1]

    def leave(self, block: Block) -> bool:
        """Leave a block; whether it was the innermost of its kind, so that what was before is to be restored."""
        place = self.blocks.index(block)
        del self.blocks[place]
        if not self.blocks:
            self.thread = None
        following = next((later for later in self.blocks[place:] if later.kind == block.kind), None)
        if following is not None:
            following.before = block.before
        return following is None

    def check_thread(self, name: str) -> None:
        """Refuse a product of one thread under a block of another.

        Raises:
            RuntimeError: if another thread is inside of a block; a backward pass may run in a thread of its own.
        """
        if self.thread not in (None, threading.get_ident()) and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(f"{name} was computed while {_OTHER_THREAD}")

    def current(self, name: str) -> Draw:
        """The draw of `noise_key`, or outside of it the next one of this module's call counter.

        Raises:
            RuntimeError: in a recomputation (gradient checkpointing) that would draw anew, or if another thread is
                inside of a block of this model.
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
