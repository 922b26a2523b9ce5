"""Copies between host memory and a device: `put` never waits for the device, and `fetch` waits once.

A program runs ahead of its device: it launches work and goes on. It stops running ahead wherever it asks for a value
(`item`, `tolist`, a condition on a tensor), for a shape that depends on values (`nonzero`, an index by a mask), or for
a copy from host memory that is not pinned. Each such wait leaves the device idle for the time that the program then
needs to launch more work. The values that a step needs are therefore fetched together, in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor

_WORD = 8
"""Bytes of the largest element (int64, float64): each tensor of a joint copy begins at a multiple of it."""


def put(
    values: Shaped[Tensor, "*shape"] | Sequence[object] | float | bool,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Shaped[Tensor, "*shape"]:
    """Values in host memory, or on a device already, as a tensor on `device`.

    On CUDA the copy is made from pinned memory, so that neither the program nor the device waits for it.

    Args:
        values: a tensor, or numbers in nested sequences.
        device: where to.
        dtype: of the result; None keeps that of a tensor, and follows torch's rule for numbers.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    target = torch.device(device)
    if target.type != "cuda" or not tensor.is_cpu:
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def fetch(tensors: Sequence[Shaped[Tensor, " ..."]]) -> list[Tensor]:
    """The tensors in host memory, bit for bit; the program waits at most once, however many there are.

    Tensors that are in host memory already are returned as they are.
    """
    there = [tensor.detach() for tensor in tensors if not tensor.is_cpu]
    if not there:
        return list(tensors)
    if len(there) == 1:
        copies = [there[0].cpu()]
    else:
        parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in there]
        padded = [torch.nn.functional.pad(part, (0, -part.numel() % _WORD)) for part in parts]
        pieces = torch.split(torch.cat(padded).cpu(), [part.numel() for part in padded])
        copies = [
            piece[: part.numel()].view(tensor.dtype).view(tensor.shape)
            for piece, part, tensor in zip(pieces, parts, there, strict=True)
        ]
    found = iter(copies)
    return [tensor if tensor.is_cpu else next(found) for tensor in tensors]


class Underway:
    """A copy of a tensor to host memory that nobody waits for; `value` is there once the device has come so far."""

    def __init__(self, tensor: Shaped[Tensor, " ..."]) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # to pinned memory, from CUDA
        self._event = mark(tensor.device)

    def value(self) -> Tensor | None:
        """The tensor in host memory; None while the device has not come so far."""
        return self._copy if self._event.query() else None


class Mark(Protocol):
    """A place in the work of a device."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...


def mark(device: torch.device) -> Mark:
    """The place in a device's work behind everything that was launched so far."""
    event: Mark = torch.get_device_module(device).Event()
    event.record()  # type: ignore[attr-defined]
    return event
