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
| 256 to 2,047 | every 16th, and all of a weight of up to 64 KiB |
| fewer | 16, evenly spread |

Every 256th check reads all lines, so that no write stays unseen for longer.

What is missed: a write that leaves all lines read as they were. An optimizer, an average or a merge changes nearly
every line. If it changes a share f of the elements of a weight with n elements of 4 bytes, the odds of not noticing are
`(1 - f)^256` with 16 lines and `(1 - f)^(n / 16)` with every 16th line; with all lines they are those of a 64-bit hash.

Where the kernels are not available (no compiler, another device) passes of 2,048 tokens or more, and every 256th, are
checked, by two sums of each weight's bits, in which a mere exchange of elements does not show. On an accelerator that
takes one synchronization a layer.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from roundoff.numerics.backend import Kernels, kernels_for

if TYPE_CHECKING:
    from roundoff.hardware.linear import LinearState

ALL_FROM, SOME_FROM = 2048, 256
"""Tokens in a pass from which all lines, or every `SOME_STEP`-th, of each weight are read."""
ALL_EVERY = 256
"""Every so many checks all lines are read, however few tokens the pass has."""
SOME_STEP = 16
FEW_LINES = 16
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
class Part:
    """The weights of one decoder layer whose `Q(W)` is cached."""

    checks: int = 0
    """Checks so far: a state that was computed since the last one begins a new pass."""
    watched: dict[int, _Watched] = field(default_factory=dict)

    def record(self, state: LinearState, weight: Tensor) -> None:
        """Remember what `Q(W)` was computed of just now."""
        self.watched.pop(id(state), None)
        tensor = weight if weight._base is None else weight._base
        if weight.device.type == "meta" or weight.numel() == 0:
            return
        address = tensor.data_ptr()
        span = sum((size - 1) * abs(stride) for size, stride in zip(weight.shape, weight.stride(), strict=True)) + 1
        start, size = weight.data_ptr(), span * weight.element_size()
        kernels = kernels_for(weight)
        item = _Watched(weakref.ref(state), weakref.ref(tensor), address, start - address, size, ())
        if kernels is None:
            prints = bit_sums([_part(item, tensor)])
        else:
            prints = [_prints(kernels, [start], [size], level)[0] for level in range(len(_LEVELS))]
        self.watched[id(state)] = replace(item, prints=tuple(prints))


@dataclass(eq=False, slots=True)
class Freshness:
    """The weights of one installed model whose `Q(W)` is cached, by decoder layer."""

    _parts: dict[str, Part] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """The layer (or the Linear outside of the layers) of this name."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part()
        return part

    def check(self, part: Part, tokens: int) -> None:
        """Check one part before a pass of many tokens computes it, or every part in the beginning of a small pass."""
        if tokens >= ALL_FROM:
            _check([part], tokens)
        else:
            _check(list(self._parts.values()), tokens)

    def check_all(self, tokens: int) -> None:
        """Check every part."""
        _check(list(self._parts.values()), tokens)

    @property
    def checks(self) -> int:
        """Checks so far of the part that was checked most often."""
        return max((part.checks for part in self._parts.values()), default=0)


def _check(parts: Sequence[Part], tokens: int) -> None:
    """Forget each cached `Q(W)` whose weight was written to since, as far as a pass of so many tokens looks."""
    for part in parts:
        part.checks += 1
    turn = max((part.checks for part in parts), default=1) % ALL_EVERY == 0
    level = 2 if turn or tokens >= ALL_FROM else 1 if tokens >= SOME_FROM else 0
    starts: list[int] = []
    sizes: list[int] = []
    watched: list[tuple[LinearState, _Watched, Tensor]] = []
    gone: list[tuple[Part, int]] = []
    for part, number, item in [(p, *entry) for p in parts for entry in p.watched.items()]:
        state, tensor = item.state(), item.tensor()
        if state is None or tensor is None or tensor.data_ptr() != item.address:
            gone.append((part, number))
            if state is not None:  # its memory may come back, at the same address and with other numbers (FSDP)
                state.refresh()
            continue
        watched.append((state, item, tensor))
        starts.append(item.address + item.offset)
        sizes.append(item.size)
    for part, number in gone:
        del part.watched[number]
    if not watched:
        return
    kernels = kernels_for(watched[0][2])
    if kernels is not None:
        now = _prints(kernels, starts, sizes, level)
        for (state, item, _), value in zip(watched, now, strict=True):
            if len(item.prints) == len(_LEVELS) and item.prints[level] != value:
                state.refresh()
    elif level == 2:
        whole = [(state, item, tensor) for state, item, tensor in watched if len(item.prints) == 1]
        for (state, item, _), value in zip(whole, bit_sums([_part(i, t) for _, i, t in whole]), strict=True):
            if item.prints[0] != value:
                state.refresh()


def part_name(name: str) -> str:
    """The dotted name of the decoder layer that a Linear lies in; its own outside of the layers."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), name)


def _prints(kernels: Kernels, starts: Sequence[int], sizes: Sequence[int], level: int) -> list[int]:
    """Fingerprints of ranges of the CPU's memory."""
    count = len(starts)
    out = (ctypes.c_uint64 * count)()
    numbers = ctypes.c_int64 * count
    kernels.fingerprint(numbers(*starts), numbers(*sizes), count, *_LEVELS[level], out)
    return list(out)


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
