"""The two products of the backward pass on hardware that quantizes gradients.

With dY the gradient of a Linear's output, each operand is quantized along the axis over which its product sums:

    dX = Q(dY) Q(W)       sums over out_features: dY in blocks along each token, W in blocks along out_features
    dW = Q(dY)^T Q(x)     sums over the tokens: dY and x in blocks along the tokens, for each channel

A weight format with two-dimensional blocks gives dX the same Q(W) as the forward pass; for any other, W is quantized a
second time, along the other axis. The x of dW is the input before the format of the forward pass, after its deadzone.
Padding tokens are left out of dW, so that blocks hold tokens of the batch alone. Formats with a scale for the whole
tensor take one for each token in dX, as activations do, and one for the whole operand in dW.

Under `stochastic`, both roundings of dY draw from keys of their own; x and W are always rounded to nearest. Under
`hadamard`, both operands of dW are multiplied by the same random orthogonal matrix in groups of 16 tokens, which leaves
the exact product unchanged and spreads outliers; the tokens are padded with zeros to a multiple of 16. Both are parts
of NVIDIA's NVFP4 recipe (arXiv:2509.25149). Rounding at random is unbiased for all but what saturates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundoff.numerics.hadamard import hadamard
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

HADAMARD_SIZE = 16
"""Number of tokens that are transformed together."""


@dataclass(frozen=True, slots=True)
class GradientArithmetic:
    """How the operands of the backward products are stored."""

    format: str
    """Format of dY."""
    stochastic: bool = False
    """Whether dY is rounded up or down at random."""
    hadamard: bool = False
    """Whether both operands of dW are transformed first."""

    def for_dx(
        self, dy: Float[Tensor, "*tokens out_features"], key: Key | None
    ) -> Float[Tensor, "*tokens out_features"]:
        """The dY of dX: in blocks along each token, which has a scale of its own."""
        return quantize(dy, self.format, tensor_scale="row", stochastic=self._key(key, "dx"))

    def for_dw(
        self,
        dy: Float[Tensor, "tokens out_features"],
        x: Float[Tensor, "tokens in_features"],
        activation_format: str | None,
        key: Key | None,
        real: Int[Tensor, " real"] | None,
    ) -> tuple[Float[Tensor, "out_features padded"], Float[Tensor, "in_features padded"]]:
        """The transposed operands of dW, `dW = first @ second.t()`, in blocks along the tokens.

        Args:
            dy: gradient of the output.
            x: input after the deadzone, in high precision.
            activation_format: format of x; None leaves it in high precision.
            key: key of the product, for stochastic rounding.
            real: indices of the tokens that are no padding; None means all.
        """
        if real is not None:
            dy, x = dy[real], x[real]
        dy, x = (operand.t().clone(memory_format=torch.contiguous_format) for operand in (dy, x))
        if self.hadamard:
            dy, x = (_transformed(operand) for operand in (dy, x))
        dy = quantize(dy, self.format, out=dy, stochastic=self._key(key, "dw"))
        return dy, x if activation_format is None else quantize(x, activation_format, out=x)

    def _key(self, key: Key | None, product: str) -> Key | None:
        if not self.stochastic:
            return None
        assert key is not None
        return key.fold("gradient", product)


def _transformed(operand: Float[Tensor, "features tokens"]) -> Float[Tensor, "features padded"]:
    """Groups of 16 tokens, the last one padded with zeros, after the Hadamard transform."""
    padding = -operand.shape[1] % HADAMARD_SIZE
    return hadamard(torch.nn.functional.pad(operand, (0, padding)) if padding else operand, HADAMARD_SIZE)
