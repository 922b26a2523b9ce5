"""Whether the weights still are what `Q(W)` was computed of: a check of their memory, in every forward pass.

torch counts writes in a tensor's version, but not all of them: a write through `weight.data` (trl's moving reference,
PEFT's merge, `vector_to_parameters`, most libraries of averaged weights), through numpy or DLPack, and the steps of
fused or compiled optimizers leave the version as it was. So a fingerprint of each weight's memory is kept with `Q(W)`.

When: before the first product of a pass on hardware with a weight format. A pass begins where a Linear is computed that
has been computed since its last check. A pass of 2,048 tokens or more checks the weights of each decoder layer before
it computes the layer, so that methods which change one layer after the other (calibration) are noticed; other writes in
the middle of a pass are noticed by the next one.

How much is read grows with the work that the pass does anyway, so that the check costs under 1 % of it:

| tokens in the pass | lines of 64 bytes that are read of each weight |
|---|---|
| 2,048 or more | all |
| 1,024 to 2,047 | every 16th, and all of a weight of up to 64 KiB |
| fewer | 8, evenly spread |

Every 256th check reads all lines, so that no write stays unseen for longer.

What is missed: a write that leaves all lines read as they were. An optimizer, an average or a merge changes nearly
every line. If it changes a share f of the elements of a weight with n elements of 4 bytes, the odds of not noticing are
`(1 - f)^128` with 8 lines and `(1 - f)^(n / 16)` with every 16th line; with all lines they are those of a 64-bit hash.

Where the kernels are not available (no compiler, another device) passes of 2,048 tokens or more, and every 256th, are
checked, by two sums of each weight's bits, in which a mere exchange of elements does not show. On an accelerator that
takes one synchronization a layer.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roundoff.numerics.backend import Kernels, build, kernels_for

if TYPE_CHECKING:
    from roundoff.hardware.linear import LinearState

ALL_FROM, SOME_FROM = 2048, 1024
"""Tokens in a pass from which all lines, or every `SOME_STEP`-th, of each weight are read."""
ALL_EVERY = 256
"""Every so many checks all lines are read, however few tokens the pass has."""
SOME_STEP = 16
FEW_LINES = 8
_LEVELS = ((FEW_LINES, 0), (0, SOME_STEP), (0, 1))
"""(lines, step) of the three amounts, as `ro_fingerprint` takes them."""


@dataclass(frozen=True, slots=True)
class _Watched:
    """Memory of one weight: where it lies within a tensor that stays, and its fingerprints."""

    state: weakref.ref[LinearState]
    tensor: weakref.ref[Tensor]
    """The weight, or the parameter that it is a part of (stacked experts)."""
    address: int
    """Of the tensor, when it was fingerprinted."""
    offset: int
    """Bytes from the tensor's address to the weight's."""
    size: int
    """Bytes that the weight spans."""
    prints: tuple[int, ...]
    """Fingerprints, one for each of `_LEVELS`; or the one that torch computes."""


@dataclass(eq=False, slots=True)
class _Table:
    """Some watched weights as the kernel takes them, and the fingerprints that they should have."""

    tensors: tuple[tuple[weakref.ref[Tensor], int], ...]
    """Each weight's tensor and its address."""
    items: tuple[_Watched, ...]
    starts: Any
    sizes: Any
    out: Any
    expected: tuple[bytes, ...]
    """Of all of them, one for each of `_LEVELS`."""

    @classmethod
    def of(cls, items: Sequence[_Watched]) -> _Table:
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
        """Weights whose memory is no longer what it was; all of their tensors must be where they were."""
        kernels.fingerprint(self.starts, self.sizes, len(self.items), *_LEVELS[level], self.out)
        if bytes(self.out) == self.expected[level]:
            return []
        return [item for item, now in zip(self.items, self.out, strict=True) if item.prints[level] != now]


@dataclass(eq=False, slots=True)
class Part:
    """The weights of one decoder layer whose `Q(W)` is cached."""

    checks: int = 0
    """Checks so far: a state that was computed since the last one begins a new pass."""
    watched: dict[int, _Watched] = field(default_factory=dict)
    table: _Table | None = None


@dataclass(eq=False, slots=True)
class Freshness:
    """The weights of one installed model whose `Q(W)` is cached, by decoder layer."""

    _parts: dict[str, Part] = field(default_factory=dict)
    _table: _Table | None = None
    """Of every part."""

    def part(self, name: str) -> Part:
        """The layer (or the Linear outside of the layers) of this name."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part()
        return part

    def record(self, part: Part, state: LinearState, weight: Tensor) -> None:
        """Remember what `Q(W)` was computed of just now."""
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
            item = replace(item, prints=tuple(bit_sums([_part(item, tensor)])))
        part.watched[id(state)] = item

    def check(self, part: Part, tokens: int) -> None:
        """Check one part before a pass of many tokens computes it, or every part in the beginning of a small pass."""
        if tokens < ALL_FROM:
            self.check_all(tokens)
            return
        part.checks += 1
        if part.table is None:
            part.table = self._tabled([part])
        if not _compared(part.table, 2):
            part.table = self._table = None
        _check_sums([part])

    def check_all(self, tokens: int) -> None:
        """Check every part."""
        turns = 0
        for part in self._parts.values():
            part.checks += 1
            turns = max(turns, part.checks)
        all_of_it = tokens >= ALL_FROM or turns % ALL_EVERY == 0
        if self._table is None:
            self._table = self._tabled(list(self._parts.values()))
        if not _compared(self._table, 2 if all_of_it else 1 if tokens >= SOME_FROM else 0):
            self._table = None
            for part in self._parts.values():
                part.table = None
        if all_of_it:
            _check_sums(list(self._parts.values()))

    def _tabled(self, parts: Sequence[Part]) -> _Table:
        """The weights of some parts; those whose tensor has gone, or has moved, are no longer watched."""
        for part in parts:
            for number, item in list(part.watched.items()):
                if not _stays(item) or item.state() is None:
                    del part.watched[number]
        return _Table.of([i for part in parts for i in part.watched.values() if len(i.prints) == len(_LEVELS)])

    @property
    def checks(self) -> int:
        """Checks so far of the part that was checked most often."""
        return max((part.checks for part in self._parts.values()), default=0)


def _compared(table: _Table, level: int) -> bool:
    """Forget each cached `Q(W)` of a table whose weight was written to; whether the table can be used again."""
    if not table.items:
        return True
    whole = table
    for reference, address in table.tensors:
        tensor = reference()
        if tensor is None or tensor.data_ptr() != address:
            whole = _Table.of([item for item in table.items if _stays(item)])
            break
    if whole.items:  # the kernels made their fingerprints, whichever path computes now
        for item in whole.changed(build(), level):
            state = item.state()
            if state is not None:
                state.refresh()
    return whole is table


def _stays(item: _Watched) -> bool:
    """Whether a weight lies where it lay; if not, its `Q(W)` is forgotten.

    Memory that was freed may come back at the same address and with other numbers (FSDP).
    """
    state, tensor = item.state(), item.tensor()
    if tensor is not None and tensor.data_ptr() == item.address:
        return True
    if state is not None:
        state.refresh()
    return False


def _check_sums(parts: Sequence[Part]) -> None:
    """The same for weights that torch fingerprints."""
    items = [item for part in parts for item in part.watched.values() if len(item.prints) == 1]
    items = [item for item in items if _stays(item)]
    tensors = [tensor for item in items if (tensor := item.tensor()) is not None]
    for item, value in zip(items, bit_sums([_part(i, t) for i, t in zip(items, tensors, strict=True)]), strict=True):
        state = item.state()
        if state is not None and item.prints[0] != value:
            state.refresh()


def part_name(name: str) -> str:
    """The dotted name of the decoder layer that a Linear lies in; its own outside of the layers."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)


def _part(item: _Watched, tensor: Tensor) -> Tensor:
    """The memory of a weight within its tensor, [elements]."""
    first, count = item.offset // tensor.element_size(), item.size // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), tensor.storage_offset() + first)


def bit_sums(weights: Sequence[Tensor]) -> list[int]:
    """A number for the bits of each weight: the sum of its words, and that of every third one."""
    if not weights:
        return []
    sums = []
    for weight in weights:
        words = weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16).reshape(-1)
        sums.append(words.sum(dtype=torch.int64) * 3 + words[::3].sum(dtype=torch.int64))
    return [int(value) for value in torch.stack(sums).tolist()]
