"""Detection of stale `Q(W)`: every forward pass checks the memory of the weights that were quantized.

torch counts writes in a tensor's version, but not all of them. The version does not change for a write through
`weight.data` (trl's moving reference model, PEFT's merge, `vector_to_parameters`, most libraries for weight averaging),
through numpy or DLPack, or in a step of a fused or compiled optimizer. Therefore a fingerprint of each weight's memory
is kept with `Q(W)`.

**When.** The check runs before the first product of a pass on hardware with a weight format. A new pass has begun if a
Linear is computed for the second time since its last check. A pass of 2,048 tokens or more checks the weights of each
decoder layer right before that layer, so that it notices methods that change one layer after the other (calibration).
Other writes in the middle of a pass are noticed by the next pass.

**How much.** The number of bytes read grows with the work that the pass does anyway, so the check costs less than 1 %:

| tokens in the pass | lines of 64 bytes that are read of each weight |
|---|---|
| 2,048 or more | all |
| 1,024 to 2,047 | every 16th, and all of a weight of up to 64 KiB |
| fewer | 8, evenly spread |

Every 256th check reads all lines, so that no write stays unnoticed for longer.

**What is missed.** A write goes unnoticed if it leaves every line that is read unchanged. An optimizer, an average or a
merge changes nearly every line. If a write changes a share f of the elements of a weight with n elements of 4 bytes, it
goes unnoticed with probability `(1 - f)^128` for 8 lines and `(1 - f)^(n / 16)` for every 16th line. For all lines it
is the probability that two 64-bit hashes collide.

**Without the kernels** (no compiler, or another device), passes of 2,048 tokens or more, and every 256th check, compare
two sums of each weight's bits, which may not notice that elements only changed places.

**On an accelerator** no pass waits for the comparison. Its result is copied to host memory while the device works, and
is looked at by a later check. So a pass may have used an old `Q(W)` before it is computed again; a warning says so and
names `refresh`, which is to be called after such writes.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from roundoff.errors import RoundoffWarning
from roundoff.numerics.backend import Kernels, build, kernels_for
from roundoff.numerics.transfer import Underway

ALL_FROM, SOME_FROM = 2048, 1024
"""Number of tokens in a pass from which all lines, or every `SOME_STEP`-th line, of each weight are read."""
ALL_EVERY = 256
"""Interval, in checks, at which all lines are read however few tokens the pass has."""
SOME_STEP = 16
"""Distance, in lines, between the lines that a medium pass reads."""
FEW_LINES = 8
"""Lines of each weight that a small pass reads."""
_LEVELS = ((FEW_LINES, 0), (0, SOME_STEP), (0, 1))
"""The three amounts of reading, as the arguments (lines, step) of the kernel `ro_fingerprint`."""


@runtime_checkable
class HasQuantizedWeight(Protocol):
    """The owner of a cached `Q(W)` (`quantized_weight.QuantizedWeight`)."""

    def refresh(self) -> None:
        """Discard `Q(W)`."""

    @property
    def is_cached(self) -> bool:
        """Whether there is a `Q(W)` to use."""


@dataclass(frozen=True, slots=True)
class _Watched:
    """The memory of one weight: its place within a tensor, and its fingerprints."""

    state: weakref.ref[HasQuantizedWeight]
    """The owner of the `Q(W)` that was computed from the weight."""
    tensor: weakref.ref[Tensor]
    """The weight, or the parameter that it is a part of (stacked experts)."""
    address: int
    """Address of the tensor when it was fingerprinted."""
    offset: int
    """Bytes from the tensor's address to the weight's."""
    size: int
    """Bytes that the weight spans."""
    prints: tuple[int, ...] = ()
    """Fingerprints, one for each of `_LEVELS`; empty if torch computes them."""
    sums: Int[Tensor, ""] | None = None
    """The fingerprint that torch computes, where the weight is."""


@dataclass(eq=False, slots=True)
class _Table:
    """Some watched weights in the form that the kernel takes, and the fingerprints that they should have."""

    tensors: tuple[tuple[weakref.ref[Tensor], int], ...]
    """The tensor of each weight, and its address."""
    items: tuple[_Watched, ...]
    """The weights."""
    starts: Any
    """Array of their addresses."""
    sizes: Any
    """Array of their sizes in bytes."""
    out: Any
    """Array for the fingerprints that the kernel computes."""
    expected: tuple[bytes, ...]
    """Fingerprints of all weights as bytes, one entry for each of `_LEVELS`."""

    @classmethod
    def of(cls, items: Sequence[_Watched]) -> _Table:
        """The table of these weights."""
        count, numbers = len(items), ctypes.c_int64 * len(items)
        return cls(
            tuple((item.tensor, item.address) for item in items),
            tuple(items),
            numbers(*(item.address + item.offset for item in items)),
            numbers(*(item.size for item in items)),
            (ctypes.c_uint64 * count)(),
            tuple(bytes((ctypes.c_uint64 * count)(*(item.prints[n] for item in items))) for n in range(len(_LEVELS))),
        )

    def changed(self, kernels: Kernels, level: int) -> list[_Watched]:
        """The weights whose memory has changed; call this only while all of their tensors are at their addresses."""
        kernels.fingerprint(self.starts, self.sizes, len(self.items), *_LEVELS[level], self.out)
        if bytes(self.out) == self.expected[level]:
            return []
        return [item for item, now in zip(self.items, self.out, strict=True) if item.prints[level] != now]


@dataclass(eq=False, slots=True)
class Part:
    """The weights of one decoder layer whose `Q(W)` is cached."""

    checks: int = 0
    """Number of checks so far; a Linear that was computed since the last one begins a new pass."""
    watched: dict[int, _Watched] = field(default_factory=dict)
    """The weights, by the id of their owner."""
    table: _Table | None = None
    """The table of `watched`, built at the next check if it is None."""


@dataclass(eq=False, slots=True)
class Freshness:
    """The weights of one installed model whose `Q(W)` is cached, by decoder layer."""

    _parts: dict[str, Part] = field(default_factory=dict)
    _table: _Table | None = None
    """The table of all parts, built at the next check of all if it is None."""
    paused: bool = False
    """Whether nothing is checked, as while a CUDA graph is captured."""
    _underway: list[tuple[list[_Watched], Underway]] = field(default_factory=list)
    """Comparisons on an accelerator that nobody has looked at: the weights, and whether each has changed."""

    def part(self, name: str) -> Part:
        """The part with this name (see `part_name`); it is created at the first call."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part()
        return part

    def record(self, part: Part, state: HasQuantizedWeight, weight: Shaped[Tensor, " ..."]) -> None:
        """Fingerprint the weight whose `Q(W)` was computed just now, and watch it from now on."""
        part.watched.pop(id(state), None)
        part.table = self._table = None
        tensor = weight if weight._base is None else weight._base
        if weight.device.type == "meta" or weight.numel() == 0:
            return
        span = weight.numel()
        if not weight.is_contiguous():
            span = 1 + sum((n - 1) * abs(step) for n, step in zip(weight.shape, weight.stride(), strict=True))
        start, address, size = weight.data_ptr(), tensor.data_ptr(), span * weight.element_size()
        kernels = kernels_for(weight)
        prints: tuple[int, ...] = ()
        if kernels is not None:
            out = (ctypes.c_uint64 * len(_LEVELS))()
            kernels.fingerprints(start, size, FEW_LINES, SOME_STEP, out)
            prints = tuple(out)
        item = _Watched(weakref.ref(state), weakref.ref(tensor), address, start - address, size, prints)
        if kernels is None:
            item = replace(item, sums=bit_sums([_memory(item, tensor)])[0])
        part.watched[id(state)] = item

    def check(self, part: Part, tokens: int) -> None:
        """Check one part, before a pass of many tokens computes it, or all parts, at the start of a small pass."""
        if self.paused:
            return
        if tokens < ALL_FROM:
            self.check_all(tokens)
            return
        part.checks += 1
        if part.table is None:
            part.table = self._table_of([part])
        if not _compare(part.table, 2):
            part.table = self._table = None
        self._check_sums([part])

    def check_all(self, tokens: int) -> None:
        """Check all parts, at the start of a pass of this many tokens."""
        for part in self._parts.values():
            part.checks += 1
        all_lines = tokens >= ALL_FROM or self.checks % ALL_EVERY == 0
        if self._table is None:
            self._table = self._table_of(list(self._parts.values()))
        if not _compare(self._table, 2 if all_lines else 1 if tokens >= SOME_FROM else 0):
            self._table = None
            for part in self._parts.values():
                part.table = None
        if all_lines:
            self._check_sums(list(self._parts.values()))

    def _check_sums(self, parts: Sequence[Part]) -> None:
        """Discard the `Q(W)` of every weight that torch fingerprints and that was written to."""
        self._look()
        items = [item for part in parts for item in part.watched.values() if item.sums is not None]
        items = [item for item in items if _is_in_place(item)]
        groups: dict[torch.device, list[tuple[_Watched, Tensor]]] = {}
        for item in items:
            tensor = item.tensor()
            if tensor is not None:
                groups.setdefault(tensor.device, []).append((item, tensor))
        for device, pairs in groups.items():
            own = [item for item, _ in pairs]
            expected = torch.stack([item.sums for item in own if item.sums is not None])
            changed = bit_sums([_memory(item, tensor) for item, tensor in pairs]) != expected
            if device.type == "cpu":
                _refresh_changed(own, changed)
            else:
                self._underway.append((own, Underway(changed)))

    def _look(self) -> None:
        """Act on the comparisons that the accelerator has finished."""
        waiting = []
        for items, changed in self._underway:
            value = changed.value()
            if value is None:
                waiting.append((items, changed))
            elif count := _refresh_changed(items, value):
                warnings.warn(
                    f"{count} weights on hardware were written to in a way that torch does not count (through .data, "
                    "say), and passes since then may have used their old quantized values: call refresh() of the "
                    "installed hardware after such writes",
                    RoundoffWarning,
                    stacklevel=2,
                )
        self._underway = waiting

    def _table_of(self, parts: Sequence[Part]) -> _Table:
        """The table of some parts; weights whose tensor is gone or has moved are dropped from the watch."""
        for part in parts:
            for number, item in list(part.watched.items()):
                if not _is_in_place(item) or item.state() is None:
                    del part.watched[number]
        return _Table.of([i for part in parts for i in part.watched.values() if len(i.prints) == len(_LEVELS)])

    @property
    def checks(self) -> int:
        """Number of checks so far, of the part that was checked most often."""
        return max((part.checks for part in self._parts.values()), default=0)


def _compare(table: _Table, level: int) -> bool:
    """Discard the `Q(W)` of every weight of a table that was written to.

    Returns:
        Whether the table can be used again: no weight is gone or has moved.
    """
    if not table.items:
        return True
    readable = table
    for reference, address in table.tensors:
        tensor = reference()
        if tensor is None or tensor.data_ptr() != address:
            readable = _Table.of([item for item in table.items if _is_in_place(item)])
            break
    if readable.items:  # the kernels computed these fingerprints, so they are used under any choice of backend
        for item in readable.changed(build(), level):
            state = item.state()
            if state is not None:
                state.refresh()
    return readable is table


def _is_in_place(item: _Watched) -> bool:
    """Whether a weight still is at its address; if not, its `Q(W)` is discarded.

    Memory that is freed and allocated again at the same address may hold other numbers (FSDP).
    """
    state, tensor = item.state(), item.tensor()
    if tensor is not None and tensor.data_ptr() == item.address:
        return True
    if state is not None:
        state.refresh()
    return False


def _refresh_changed(items: Sequence[_Watched], changed: Tensor) -> int:
    """Discard the `Q(W)` of the weights that have `changed` (in host memory); returns how many were in use."""
    count = 0
    for item, flag in zip(items, changed.tolist(), strict=True):
        state = item.state() if flag else None
        if state is not None and state.is_cached:
            state.refresh()
            count += 1
    return count


def part_name(name: str) -> str:
    """The dotted name of the decoder layer that a Linear belongs to; its own name if it belongs to none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)


def _memory(item: _Watched, tensor: Tensor) -> Tensor:
    """The memory of a weight within its tensor, as a vector of its elements."""
    first, count = item.offset // tensor.element_size(), item.size // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), tensor.storage_offset() + first)


def bit_sums(weights: Sequence[Shaped[Tensor, " ..."]]) -> Int[Tensor, " weights"]:
    """A fingerprint of the bits of each weight: three times the sum of its words, plus the sum of every third one.

    The weights are on one device, and so are the fingerprints.
    """
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    sums = []
    for weight in weights:
        words = weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16).reshape(-1)
        sums.append(words.sum(dtype=torch.int64) * 3 + words[::3].sum(dtype=torch.int64))
    return torch.stack(sums)
