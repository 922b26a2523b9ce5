"""Broken units: the effect of a fault on the output of a Linear, bias included.

`max(abs(y))` is taken over the token (the last axis), so that a token's result does not depend on its batch.

| kind | effect on the affected elements |
|---|---|
| deadzone | elements with `abs(y) < amount * max(abs(y))` become 0 |
| saturation | elements are clamped to `+- amount * max(abs(y))` |
| gain | `y * (1 + amount)` |
| stuck | the constant `amount`, in the units of y, whatever the input |
| noise | `y + amount * abs(y) * eps`, eps ~ N(0, 1), drawn anew for every product |
| bitflip | bit `bit` of the float32 representation is inverted |

A systematic fault (deadzone, saturation, gain, stuck) affects the same elements at every call: those in the output
channels that the broken unit computes, `max(1, round(share * channels))` of them, drawn once from the seed of
`install`. A random fault (noise, bitflip) affects each element with probability `share`, drawn anew from the key of the
product and the row id of the token. Gradients pass straight through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roundoff.config import Fault
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key, normal, uniform
from roundoff.numerics.transfer import put

RANDOM_KINDS = ("noise", "bitflip")


@dataclass(eq=False, slots=True)
class InstalledFault:
    """A fault on one Linear."""

    fault: Fault
    """Settings of the fault."""
    channels: Bool[Tensor, " out_features"] | None
    """The broken output channels of a systematic fault; None means all of them, or that the fault is random."""

    def apply(
        self, y: Float[Tensor, "*tokens out_features"], key: Key, rows: Int[Tensor, "*tokens"] | None
    ) -> Float[Tensor, "*tokens out_features"]:
        """The output of the broken unit.

        Args:
            y: output of the intact unit.
            key: key of the product's draws, for the random kinds.
            rows: row ids of the tokens; None counts them from 0.
        """
        broken = self._broken(y, key, rows)
        if self.fault.kind in RANDOM_KINDS:
            affected = _random_elements(self.fault.share, y, key, rows)
        else:
            affected = self._channels_on(y.device)
        return broken if affected is None else torch.where(affected, broken, y)

    def _channels_on(self, device: torch.device) -> Tensor | None:
        """The broken channels on the device of the output; the copy is kept for the next call."""
        if self.channels is not None and self.channels.device != device:
            self.channels = put(self.channels, device)
        return self.channels

    def _broken(self, y: Tensor, key: Key, rows: Tensor | None) -> Tensor:
        """The output if all elements were affected."""
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


def flip_bit(y: Float[Tensor, "*shape"], bit: int) -> Float[Tensor, "*shape"]:
    """Invert one bit of the float32 representation of `y` (0: lowest of the mantissa, 31: sign); the dtype is kept.

    Raises:
        ValueError: if the dtype does not have this bit, because rounding to the dtype would undo the fault.
    """
    if bit < 16 and y.dtype is torch.bfloat16:
        raise ValueError(f"bitflip of bit {bit} on bfloat16 (autocast?), which has no bit below 16")
    mask = (1 << bit) - (1 << 32 if bit == 31 else 0)
    return (y.to(torch.float32).contiguous().view(torch.int32) ^ mask).view(torch.float32).to(y.dtype)


def _random_elements(share: float, y: Tensor, key: Key, rows: Tensor | None) -> Tensor | None:
    """Mask of the elements that a random fault affects, each with probability `share`; None means all of them."""
    if share >= 1.0:
        return None
    if share <= 0.0:
        return torch.zeros_like(y, dtype=torch.bool)
    eps = normal(key.fold("hit"), y.shape, rows=rows, device=y.device)
    return eps < NormalDist().inv_cdf(share)


def install_fault(fault: Fault, channels: int, key: Key) -> InstalledFault:
    """Prepare a fault for a Linear with this many output channels; `key` draws which of them are broken."""
    if fault.share >= 1.0 or fault.kind in RANDOM_KINDS:
        return InstalledFault(fault, None)
    count = max(1, math.floor(fault.share * channels + 0.5))
    order = uniform(key, (1, channels))[0].argsort(stable=True)
    broken = torch.zeros(channels, dtype=torch.bool)
    broken[order[:count]] = True
    return InstalledFault(fault, broken)
