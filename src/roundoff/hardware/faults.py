"""Broken units: what a fault does to the output of a Linear, bias included.

`max(abs(y))` is that of the token (the last axis), so that a token's result does not depend on its batch.

| kind | effect on the elements concerned |
|---|---|
| deadzone | `abs(y) < amount * max(abs(y))` becomes 0 |
| saturation | clamped to `+- amount * max(abs(y))` |
| gain | `y * (1 + amount)` |
| stuck | the constant `amount`, in the units of y, whatever the input |
| noise | `y + amount * abs(y) * eps`, eps ~ N(0, 1), drawn anew for every product |
| bitflip | bit `bit` of the float32 representation inverted |

The elements concerned are the same at every call for the systematic kinds (deadzone, saturation, gain, stuck): the
output channels that a broken unit computes, `max(1, round(share * channels))` of them, drawn once from the seed of
`install`. For the random kinds (noise, bitflip) each element is hit with probability `share`, drawn anew from the
product's key and the token's row id. Gradients pass straight through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from roundoff.config import Fault
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key, normal, uniform

RANDOM_KINDS = ("noise", "bitflip")


@dataclass(eq=False, slots=True)
class InstalledFault:
    """A fault on one Linear with its broken output channels [out] (None: all of them)."""

    fault: Fault
    channels: Tensor | None

    def apply(self, y: Tensor, key: Key, rows: Tensor | None) -> Tensor:
        """`y` [..., out] as the broken unit gives it; `rows` [...] identify the tokens."""
        broken = self._broken(y, key, rows)
        if self.fault.kind in RANDOM_KINDS:
            concerned = _hit(self.fault.share, y, key, rows)
        else:
            concerned = self._channels_on(y.device)
        return broken if concerned is None else torch.where(concerned, broken, y)

    def _channels_on(self, device: torch.device) -> Tensor | None:
        if self.channels is not None and self.channels.device != device:
            self.channels = self.channels.to(device)
        return self.channels

    def _broken(self, y: Tensor, key: Key, rows: Tensor | None) -> Tensor:
        amount = self.fault.amount
        match self.fault.kind:
            case "deadzone":
                size = y.abs()
                return y.masked_fill(size < amount * size.amax(-1, keepdim=True), 0.0)
            case "saturation":
                limit = amount * y.abs().amax(-1, keepdim=True)
                return torch.minimum(torch.maximum(y, -limit), limit)
            case "gain":
                return y * (1.0 + amount)
            case "stuck":
                return torch.full_like(y, amount)
            case "noise":
                return matmul_noise(y, amount, key.fold("noise"), rows=rows)
            case "bitflip":
                return flip_bit(y, self.fault.bit)


def flip_bit(y: Tensor, bit: int) -> Tensor:
    """`y` with one bit of its float32 representation inverted (0: lowest of the mantissa, 31: sign); same dtype.

    Raises:
        ValueError: if the dtype has no such bit, so that rounding to it would undo the fault.
    """
    if bit < 16 and y.dtype is torch.bfloat16:
        raise ValueError(f"bitflip of bit {bit} on bfloat16 (autocast?), which has no bit below 16")
    mask = (1 << bit) - (1 << 32 if bit == 31 else 0)
    return (y.to(torch.float32).contiguous().view(torch.int32) ^ mask).view(torch.float32).to(y.dtype)


def _hit(share: float, y: Tensor, key: Key, rows: Tensor | None) -> Tensor | None:
    """Which elements a random fault hits, each with probability `share`; None: all of them."""
    if share >= 1.0:
        return None
    if share <= 0.0:
        return torch.zeros_like(y, dtype=torch.bool)
    eps = normal(key.fold("hit"), y.shape, rows=rows, device=y.device)
    return eps < NormalDist().inv_cdf(share)


def install_fault(fault: Fault, channels: int, key: Key) -> InstalledFault:
    """The fault on a Linear of so many output channels, with its broken channels drawn from the key."""
    if fault.share >= 1.0 or fault.kind in RANDOM_KINDS:
        return InstalledFault(fault, None)
    count = max(1, math.floor(fault.share * channels + 0.5))
    order = uniform(key, (1, channels))[0].argsort(stable=True)
    broken = torch.zeros(channels, dtype=torch.bool)
    broken[order[:count]] = True
    return InstalledFault(fault, broken)
