"""Errors of a Linear's products besides the published noise, and their order.

    y1 = y + s * scale * eps                    noise; scale is abs(y), or one of the two below
    y2 = y1 * (1 + gain_std * g_c)              gain of output channel c, the same in every pass
    y3 = step * clamp(round(y2 / step))         converter

y is the product of the quantized operands that are multiplied, summed by the accumulator where there is one; the bias
comes after the converter, and the faults of the unit after the bias.

- `operands`: `scale = sqrt(sum_k (x_k w_k)^2)` for each element. For dX the operands are dY and W, for dW dY and x.
- `row`: `scale = sqrt(mean_j y_j^2)` over the row: the outputs of one token in y, the inputs of one token in dX, the
  inputs of one output channel in dW.
- The converter has `2^bits - 1` levels from -range to range, `step = 2 range / (2^bits - 2)`, and saturates. The range
  of a token is `adc_range * max_k abs(x_k) * max abs(W)`: inputs are scaled to the largest of the token and weights to
  the largest of the matrix, and the converter has a fixed range in units of one full-scale input on one full-scale cell
  (`out_bound`, `out_res` and `NoiseManagementType.ABS_MAX` of IBM's aihwkit; Rasch et al., Nature Communications 14,
  5282, 2023). It depends on no other token.

Gain and converter belong to the circuits that read the columns of the forward product, and so do not apply to dX and
dW; their derivative counts as 1, also where the converter saturates. The noise applies to dX and dW as `backward` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.config import MatmulNoise
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key, normal
from roundoff.numerics.scaled_noise import operand_std, row_std, scaled_noise
from roundoff.numerics.transfer import put

Scale = Literal["output", "operands", "row"]
"""What the standard deviation of the noise is relative to."""


@dataclass(eq=False, slots=True)
class ErrorModel:
    """The errors of one Linear's products."""

    scale: Scale = "output"
    """What the noise is relative to."""
    gain: Float[Tensor, " out_features"] | None = None
    """Gain of each output channel, `1 + gain_std * g` (float32); None: all are 1."""
    adc_bits: int | None = None
    """Bits of the converter; None: there is none."""
    adc_range: float = 0.0
    """Range of the converter in units of `max(abs(x)) * max(abs(W))`."""

    @property
    def changes_output(self) -> bool:
        """Whether the forward product is changed besides its noise."""
        return self.gain is not None or self.adc_bits is not None

    def read(
        self,
        y: Float[Tensor, "*tokens out_features"],
        x: Float[Tensor, "*tokens in_features"],
        weight: Float[Tensor, "out_features in_features"],
    ) -> Float[Tensor, "*tokens out_features"]:
        """The product after gain and converter, rounded once to its dtype.

        Args:
            y: the product after noise.
            x: the quantized input.
            weight: the quantized weight.
        """
        if not self.changes_output:
            return y
        result = y.to(torch.float32)
        if self.gain is not None:
            if self.gain.device != y.device:
                self.gain = put(self.gain, y.device)
            result = result * self.gain
        if self.adc_bits is not None:
            largest = x.abs().amax(-1, keepdim=True).to(torch.float32) * weight.abs().amax().to(torch.float32)
            result = converted(result, largest * self.adc_range, self.adc_bits)
        return result.to(y.dtype)


def converted(
    y: Float[Tensor, "*tokens columns"], limit: Float[Tensor, "*tokens 1"], bits: int
) -> Float[Tensor, "*tokens columns"]:
    """`y` rounded to the nearest of `2^bits - 1` equidistant levels from -limit to limit; beyond, it saturates.

    A limit of zero gives zero. NaN stays NaN.
    """
    most = 2 ** (bits - 1) - 1
    step = limit * (1.0 / most)
    codes = (y / step).round_().clamp_(-most, most) * step
    return torch.where(step > 0, codes, y * 0.0)


def perturb(
    y: Float[Tensor, "*rows columns"],
    operands: tuple[Tensor, Tensor],
    std: float,
    scale: Scale,
    key: Key,
    *,
    rows: Int[Tensor, "*rows"] | None = None,
    column_start: Int[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """Add noise to a product, in place.

    Args:
        y: the product.
        operands: a and b of `y = a @ b^T`, as they were multiplied.
        std: standard deviation of the noise relative to its scale (fraction).
        scale: what it is relative to.
        key: key of the product's draws.
        rows: identity of each row; None counts them from 0.
        column_start: logical index of each row's first column; None: 0.
    """
    if scale == "output":
        return matmul_noise(y, std, key, rows=rows, column_start=column_start, out=y)
    width = operand_std(*operands) if scale == "operands" else row_std(y)
    return scaled_noise(y, width.mul_(std), key, rows=rows, column_start=column_start)


def install_errors(noise: MatmulNoise, out_features: int, key: Key) -> ErrorModel | None:
    """The errors of a Linear with this many output channels, of which `key` draws the gains; None: the published noise.

    The gains are those of the channels, whatever the number of tokens.
    """
    if not noise.other_errors:
        return None
    gain = None
    if noise.gain_std:
        gain = 1.0 + noise.gain_std * normal(key, (1, out_features))[0]
    return ErrorModel(noise.scale, gain, noise.adc_bits, noise.adc_range)
