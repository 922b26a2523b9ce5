"""Tallies of quantization error: sums over tokens from which the metrics of a scan are computed.

**Sink tokens.** In trained models a few tokens, mainly the first, carry nearly all of the residual stream's energy,
because attention uses them as a place to look when there is nothing to see. A mean over the entire tensor would
describe just that token. A token counts as a sink of a layer if its energy |h_t|^2 at the layer's input or output is
more than `SINK_FACTOR` times the median over the batch's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from roundoff.formats.table import get_format
from roundoff.hardware import InstalledHardware
from roundoff.hardware.experts import PROJECTIONS
from roundoff.hardware.linear import HardwareLinear
from roundoff.numerics import blocks
from roundoff.numerics.quantize import quantize

SINK_FACTOR = 100.0
"""Multiple of the median token's energy above which a token is a sink."""


@dataclass(slots=True)
class Tally:
    """Running sums of one metric's numerator and denominator."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: Shaped[Tensor, ""] | int | float, count: Shaped[Tensor, ""] | int | float) -> None:
        """Add to both sums."""
        self.total += float(total)
        self.count += float(count)

    def merged(self, other: Tally) -> Tally:
        """The sums of both tallies."""
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float | None:
        """Numerator over denominator; None if nothing was counted."""
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Tallies:
    """The tallies of one layer or one Linear, by metric name."""

    by_name: dict[str, Tally] = field(default_factory=dict)

    def add(self, name: str, total: Shaped[Tensor, ""] | int | float, count: Shaped[Tensor, ""] | int | float) -> None:
        """Add to the sums of one metric."""
        self.by_name.setdefault(name, Tally()).add(total, count)

    def merged(self, other: Tallies) -> Tallies:
        """The sums of both, metric by metric."""
        names = {**self.by_name, **other.by_name}
        empty = Tally()
        return Tallies({n: self.by_name.get(n, empty).merged(other.by_name.get(n, empty)) for n in names})

    def mean(self, name: str) -> float | None:
        """The mean of one metric; None if nothing was counted."""
        tally = self.by_name.get(name)
        return None if tally is None else tally.mean


@dataclass(frozen=True, slots=True)
class InputErrors:
    """Errors of one Linear's input, token by token."""

    energy: Float[Tensor, " tokens"]
    """|Q(x_t) - x_t|^2 / |x_t|^2, float64; 0 for a token of zeros."""
    nonzero: Int[Tensor, " tokens"]
    """Number of elements that are not zero."""
    dead: Int[Tensor, " tokens"]
    """Number of elements that quantization turns into zero."""
    saturated: Int[Tensor, " tokens"]
    """Number of elements beyond the largest number that their block can hold."""


def input_errors(x: Float[Tensor, "tokens in_features"], fmt: str) -> InputErrors:
    """Errors of tokens that are quantized like activations, with a tensor scale per token."""
    q = quantize(x, fmt, tensor_scale="row").to(torch.float32)
    x = x.to(torch.float32)
    nonzero = (x != 0).sum(-1)
    noise = (q - x).square().sum(-1, dtype=torch.float64)
    signal = x.square().sum(-1, dtype=torch.float64)
    return InputErrors(
        torch.where(signal > 0, noise / signal.clamp(min=1e-300), 0.0),
        nonzero,
        nonzero - (q != 0).sum(-1),
        saturated(x, fmt).sum(-1),
    )


def saturated(x: Float[Tensor, "tokens in_features"], fmt: str) -> Bool[Tensor, "tokens in_features"]:
    """Which elements of `x` (float32) are beyond the largest number that their block can hold."""
    spec = get_format(fmt)
    if spec.element is None:
        return x.isfinite() & ~quantize(x, fmt).isfinite()
    return blocks.saturated(x, spec)


@dataclass(frozen=True, slots=True)
class WeightDamage:
    """Energy of a weight and of its quantization error."""

    layer: int | None
    """Index of the decoder layer; None outside the layers."""
    noise: float
    """|Q(W) - W|^2."""
    signal: float
    """|W|^2."""


def weight_damage(installed: InstalledHardware) -> dict[str, WeightDamage]:
    """The damage to every quantized weight, by the Linear's name."""
    damages = {}
    for entry, module in zip(installed.entries, installed.in_force.modules, strict=True):
        if entry.weight is None:
            continue
        noise = signal = 0.0
        for weight, quantized in _weights(module, entry.weight):
            error = quantized.to(torch.float32) - weight.to(torch.float32)
            noise += float(error.square_().sum(dtype=torch.float64))
            signal += float(weight.to(torch.float32).square().sum(dtype=torch.float64))
        damages[entry.name] = WeightDamage(entry.layer, noise, max(signal, 1e-300))
    return damages


def _weights(module: nn.Module, fmt: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights [out_features, in_features] of an installed module, each with `Q(W)`."""
    if isinstance(module, HardwareLinear):
        weight = module.weight.detach()
        yield weight, module.hardware_state.stored.quantized(weight)
        return
    for projection in PROJECTIONS:
        for weight in getattr(module, projection).detach():
            yield weight, quantize(weight, fmt)


def add_classic(tallies: Tallies, h: Float[Tensor, "tokens hidden"], fmt: str) -> None:
    """Add the classic metrics of a layer's output `h`: element-wise relative error, and noise over signal."""
    h = h.to(torch.float32)
    noise = (quantize(h, fmt, tensor_scale="row") - h).abs_()
    nonzero = h != 0
    relative = torch.where(nonzero, noise / torch.where(nonzero, h.abs(), 1.0), 0.0)
    tallies.add("relative_error", relative.sum(dtype=torch.float64), nonzero.sum())
    tallies.add("sqnr", noise.square().sum(dtype=torch.float64), h.square().sum(dtype=torch.float64))


def decibel(noise_to_signal: float | None) -> float | None:
    """Signal-to-noise ratio in dB, `-10 log10(noise_to_signal)`; infinite without noise."""
    if noise_to_signal is None:
        return None
    return math.inf if noise_to_signal == 0 else -10.0 * math.log10(noise_to_signal)


def sink_tokens(
    before: Float[Tensor, "tokens hidden"], after: Float[Tensor, "tokens hidden"]
) -> Bool[Tensor, " tokens"]:
    """Which tokens are attention sinks of a layer, from its input and its output."""
    energy = torch.maximum(before.float().square().sum(-1), after.float().square().sum(-1))
    return energy > SINK_FACTOR * energy.median()
