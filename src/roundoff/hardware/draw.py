"""The source of the noise in one forward pass: a key, and the identity of every token.

A draw is a function of (key, layer, product, row id, column). The row id of a token is
`rollout_id * POSITIONS + position`, with positions counted without padding. A token's noise therefore depends neither
on the batch that it is computed in nor on its padding, and the training pass can replay the draws of the rollout. A
product without token rows (`dW`) folds a fingerprint of the batch's row ids into its key instead.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from roundoff.errors import RoundoffWarning
from roundoff.hardware.freshness import Freshness
from roundoff.hardware.row_ids import AttentionRows, attention_rows
from roundoff.numerics.rng import Key
from roundoff.numerics.transfer import put

_OTHER_THREAD = (
    "another thread is inside noise_key or hardware_off of the same model, which apply to all of its products: give "
    "each thread a copy of the model (copy.deepcopy), or use a lock"
)


class Draw:
    """The key and the row ids of one forward pass; without row ids, each product counts its rows from 0.

    Args:
        key: key of the pass.
        rows: row id of each token, where the products are computed.
        host: the row ids in host memory.
        column: column of a static key-value cache that holds the last token; None: the last one.

    Raises:
        ValueError: if the row ids are not int64 or do not have two axes.
    """

    __slots__ = (
        "_attention",
        "_column",
        "_fingerprint",
        "_names",
        "_real",
        "_tag",
        "_views",
        "host",
        "key",
        "real",
        "rows",
    )

    def __init__(
        self,
        key: Key,
        rows: Int[Tensor, "rollouts columns"] | None,
        host: Int[Tensor, "rollouts columns"] | None = None,
        column: Int[Tensor, ""] | None = None,
        real: Bool[Tensor, "rollouts columns"] | None = None,
    ) -> None:
        if rows is not None and (rows.dtype is not torch.int64 or rows.dim() != 2):
            raise ValueError(
                f"rows must be int64 of shape [rollouts, columns], but is {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if real is not None and (rows is None or real.shape != rows.shape or real.dtype is not torch.bool):
            raise ValueError("real must be bool, with one value for each of the rows")
        self.key = key
        self.rows = rows
        self.host = rows if host is None else host
        self._column = column
        self.real = real
        self._real: dict[torch.Size, Tensor] = {}
        self._views: dict[tuple[int, ...], Tensor] = {}
        self._attention: dict[tuple[int, int, int, int, int], AttentionRows] = {}
        self._fingerprint: int | None = None
        self._tag: Tensor | None = None
        self._names: set[str] | None = set()  # of the modules that drew so far; None after the warning

    def note(self, name: str) -> None:
        """Record that a module draws from this; warn if it did before, because both products get the same noise.

        A recomputation in the backward pass (gradient checkpointing) does not count: it should repeat the noise.
        """
        if self._names is None or torch._C._current_graph_task_id() != -1:
            return
        if name not in self._names:
            self._names.add(name)
            return
        self._names = None  # warn only once
        warnings.warn(
            f"{name} is computed a second time inside one noise_key block and draws the same noise as the first time: "
            "use one block for each forward pass, and two modules where a model calls one module twice in a pass",
            RoundoffWarning,
            stacklevel=2,
        )

    @property
    def tag(self) -> Int[Tensor, " 2"]:
        """The key as a tensor, which a product saves for its backward pass.

        Under gradient checkpointing the backward pass sees the tensors that the recomputation saved, so the tag shows
        whether the recomputation drew from the same key.
        """
        if self._tag is None:
            self._tag = torch.tensor([self.key.value >> 32, self.key.value & 0xFFFFFFFF], device="cpu")
        return self._tag

    def check_tag(self, tag: Int[Tensor, " 2"], name: str) -> None:
        """Check, in the backward pass, that the saved tensors were drawn from this key.

        Raises:
            RuntimeError: if gradient checkpointing computed them again inside another `noise_key`.
        """
        if tag is not self._tag and tag.tolist() != self.tag.tolist():
            raise RuntimeError(
                f"{name} was recomputed in the backward pass inside another noise_key than its forward pass: keep the "
                "noise_key of the forward pass open until backward() is done, and open no other in between"
            )

    @property
    def fingerprint(self) -> int:
        """64-bit hash of the row ids of this pass, for products that have no token rows; 0 without row ids."""
        if self._fingerprint is None:
            data = b"" if self.host is None else self.host.cpu().contiguous().numpy().tobytes()
            digest = hashlib.blake2b(data, digest_size=8).digest()
            self._fingerprint = int.from_bytes(digest, "little") if data else 0
        return self._fingerprint

    def rows_of(self, leading: torch.Size, name: str, *, last: bool = False) -> Int[Tensor, " ..."] | None:
        """Row ids in the shape of a product's leading axes, or None if there are none.

        Args:
            leading: shape of the product without its last axis: [rollouts, columns] or any reshape of it.
            name: name of the module, for the error.
            last: whether a product over fewer columns belongs to the last ones, as in an output embedding under
                `logits_to_keep`.

        Raises:
            ValueError: if the product does not see all the tokens of `noise_key`; a guess could be silently wrong.
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

    def real_tokens(self, leading: torch.Size, name: str, *, last: bool = False) -> Int[Tensor, " real"] | None:
        """Indices, among the tokens of a product, of those that are no padding; None means all. See `rows_of`."""
        if self.real is None:
            return None
        self.rows_of(leading, name, last=last)  # raises if the product does not see all tokens
        found = self._real.get(leading)
        if found is None:
            real = self.real if leading.numel() == self.real.numel() else self.real[:, -leading[1] :]
            index = real.reshape(-1).nonzero().flatten()
            found = self._real[leading] = index if self.rows is None else put(index, self.rows.device)
        return found

    def attention_rows(self, name: str, query: torch.Size, key: torch.Size) -> AttentionRows | None:
        """Row ids of the products of one attention layer, or None if there are none.

        Args:
            name: name of the module, for the error.
            query: shape [rollouts, heads, queries, head_size] of the queries.
            key: shape [rollouts, key_heads, keys, head_size] of the keys.

        Raises:
            ValueError: if the queries are not the tokens of `noise_key`.
        """
        if self.rows is None:
            return None
        batch, heads, queries, _ = query
        key_heads, keys = key[1], key[2]
        shape = (batch, heads, queries, key_heads, keys)
        rows = self._attention.get(shape)
        if rows is None:
            if self.rows.shape != (batch, queries):
                raise ValueError(
                    f"{name} has queries of {batch} x {queries} tokens, but noise_key was given rows of shape "
                    f"{tuple(self.rows.shape)}: give one row id for each token of this forward pass"
                )
            rows = self._attention[shape] = attention_rows(self.rows, heads, key_heads, keys, self._column)
        return rows


@dataclass(eq=False, slots=True)
class Block:
    """An open `noise_key` or `hardware_off` block, and the state that it restores.

    Blocks inside unfinished generators may be closed in any order. A block that is not the innermost of its kind
    changes nothing when it closes: it passes the state that it would restore to the next block inside it.
    """

    kind: str
    """`noise_key` or `hardware_off`."""
    before: Any
    """State before the block: the draw, or whether the hardware was on."""


@dataclass(eq=False, slots=True)
class Runtime:
    """State that all layers of one installed model share while it runs."""

    seed_key: Key
    """Key of the draws outside of `noise_key`."""
    on: bool = True
    """Whether the hardware is on (outside of `hardware_off`)."""
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
    """The thread that opened `noise_key` or `hardware_off`; None if no block is open."""
    blocks: list[Block] = field(default_factory=list)
    """The open blocks, in the order in which they were entered."""
    freshness: Freshness = field(default_factory=Freshness)
    """Detector of writes to weights that torch does not count."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy (deepcopy, pickle): without activations, and without blocks that it would never leave."""
        state: dict[str, Any] = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        state |= dict.fromkeys(("shared", "draw", "owner", "thread"))
        state |= {"freshness": Freshness(), "blocks": []}
        state["on"] = next((block.before for block in self.blocks if block.kind == "hardware_off"), self.on)
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
            RuntimeError: if it does not, because padding would enter the blocks of quantized gradients, or the chunks
                of an accumulator.
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
