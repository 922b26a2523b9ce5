"""The number formats of attention: of the keys and values that are cached, and of the operands of QK^T and PV.

| operand | one row (and one row scale) is | formats |
|---|---|---|
| K, V in the cache (`precision.kv_cache`) | one head of one token | all whose blocks lie within a row |
| Q and K of QK^T (`precision.attention`) | one head of one token, the axis of the sum | those without blocks |
| P of PV | the weights of one query and head over the keys, the axis of the sum | those without blocks |
| V of PV | one head of one token, as the cache holds it | those without blocks |

- **The cache.** Keys (after their position embedding) and values are quantized once, when a token is computed, and
  every query reads them so, that of the token itself included: a kernel for decoding writes the new column before it
  reads the cache. A training pass has no cache and does the same, so that it computes what the rollouts computed. Some
  kernels read the keys and values of a prompt unquantized while they process it; that is not simulated, because a token
  would then be computed differently in rollout and training.
- **The weights P.** Blocks along the keys would shift with left padding, and the block of the last tokens would change
  as the cache grows, so formats with blocks are refused. A scale for each query is exact in this respect: hidden keys
  have weight 0. With fp8_e4m3 it maps the largest weight to 448, which is the static scale of SageAttention2
  (arXiv:2411.10958) on weights that are not yet normalized.
- **The values V.** A scale for each channel over all keys (as SageAttention has it) would depend on later tokens, so V
  has the rows in which the cache stores it. Its scales lie along the axis of the sum: a kernel multiplies them into P,
  or into V as it is read. Here the product of the numbers themselves is computed.
- Keys and values that the cache stores in the same format are taken as they are, without a second rounding.
- Gradients pass straight through. The four products of the backward pass multiply the quantized operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from roundoff.numerics.quantize import quantize


@dataclass(eq=False, slots=True)
class AttentionFormats:
    """The formats of one attention layer, and what a cache has stored in them."""

    cache: str | None = None
    """Format of cached keys and values; None means high precision."""
    operands: str | None = None
    """Format of the operands of QK^T and PV; None means high precision."""
    _stored: tuple[Tensor, Tensor] | None = None
    """Keys and values that a cache handed over and that attention has not read yet."""

    def __bool__(self) -> bool:
        return bool(self.cache or self.operands)

    def __getstate__(self) -> tuple[str | None, str | None]:
        """The state of a copy (deepcopy, pickle), without what a cache has handed over."""
        return self.cache, self.operands

    def __setstate__(self, state: tuple[str | None, str | None]) -> None:
        self.cache, self.operands = state
        self._stored = None

    def in_cache(
        self, x: Float[Tensor, "*tokens size"], out: Float[Tensor, "*tokens size"] | None = None
    ) -> Float[Tensor, "*tokens size"]:
        """Keys or values as the cache stores them, without gradient; each row is one head of one token.

        They are written to `out` if it is given, which may be `x`.
        """
        if self.cache is None:
            return x if out is None else out.copy_(x)
        return quantize(x.detach() if out is None else x, self.cache, tensor_scale="row", out=out)

    def hand_over(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns of a cache that have passed `in_cache`, and tell the next `read_back` so."""
        if self.cache is not None:
            self._stored = keys, values
        return keys, values

    def read_back(
        self,
        keys: Float[Tensor, "rollouts heads keys size"],
        values: Float[Tensor, "rollouts heads keys value_size"],
    ) -> tuple[Float[Tensor, "rollouts heads keys size"], Float[Tensor, "rollouts heads keys value_size"]]:
        """Keys and values as every query reads them: stored and read back, unless a cache has done that already.

        A cache of transformers holds them unquantized, and they are quantized anew at every step, with the same result.

        Raises:
            RuntimeError: if the model changed the keys or values after the cache handed them over.
        """
        stored, self._stored = self._stored, None
        if self.cache is None:
            return keys, values
        if stored is None:
            return straight_through(keys, self.cache), straight_through(values, self.cache)
        if keys is not stored[0] or values is not stored[1]:
            raise RuntimeError(
                "the model changes keys or values between its cache and attention, so that hardware.precision.kv_cache "
                "cannot tell which of them are stored already: leave it out for this model"
            )
        return keys, values

    def key_operand(self, x: Float[Tensor, "*tokens size"]) -> Float[Tensor, "*tokens size"]:
        """Keys or values, after `read_back`, as operands of a product; rounded once if both formats are the same."""
        return x if self.operands == self.cache else self.operand(x)

    def operand(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Queries or attention weights as operands of a product."""
        return x if self.operands is None else straight_through(x, self.operands)


class _StraightThrough(torch.autograd.Function):
    """Quantize-dequantize of rows along the last axis, whose derivative counts as 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: str) -> Tensor:
        return quantize(x, fmt, tensor_scale="row")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(x: Float[Tensor, "*rows size"], fmt: str) -> Float[Tensor, "*rows size"]:
    """`x` stored in a format, one row for each index of the leading axes, with the gradient of `x` itself."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return quantize(x, fmt, tensor_scale="row")
    result: Tensor = _StraightThrough.apply(x, fmt)  # type: ignore[no-untyped-call]
    return result
