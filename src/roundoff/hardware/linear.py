"""A Linear on simulated hardware: `Q(x) Q(W)^T` with noise on every product, and a straight-through backward pass.

    y  = noise(Q(x) Q(W)^T) + b, then the faults of the unit       key.fold(name, "forward")
    dX = noise(dY Q(W))                                            key.fold(name, "dx")
    dW = noise(dY^T Q(x))                                          key.fold(name, "dw", fingerprint of the rows)

- Each product is summed by the accumulator where one is set (`numerics.accumulate`), for dW over the tokens that are no
  padding. `error_models` has the errors besides the published noise: other scales, gain and converter.
- The bias is added after the noise, in the model's dtype, because it is not part of the matrix product.
- Activations are quantized with `tensor_scale="row"`: formats with a scale for the whole tensor (nvfp4, fp8_e4m3) use
  one scale per token, so that a token's result depends neither on padding nor on how the batch is split. For the same
  reason the deadzone is relative to the maximum of the token. The deadzone comes before the format.
- `dX` and `dW` pass straight through formats, deadzone and faults: the derivative of each counts as 1. Where a format
  of gradients is set, their operands are quantized as `gradients` says.
- `Q(W)` is kept until the weight changes (`quantized_weight`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roundoff.hardware.draw import Draw
from roundoff.hardware.error_models import ErrorModel, Scale, perturb
from roundoff.hardware.faults import InstalledFault
from roundoff.hardware.gradients import GradientArithmetic
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.hardware.quantized_weight import QuantizedWeight
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.accumulate import PartialSums, accumulated
from roundoff.numerics.deadzone import outside_of_deadzone
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

LINEAR_STATE = "hardware_state"
"""Attribute of a Linear on hardware that holds its `LinearState`."""


@dataclass(frozen=True, slots=True)
class ProductKeys:
    """Keys of the three products of one Linear, derived from one base key."""

    base: Key
    forward: Key
    dx: Key
    dw: Key


@dataclass(eq=False, slots=True)
class LinearState:
    """What the hardware does to one Linear in some phases; it is no parameter and no buffer of the module."""

    name: str
    """Dotted name without the parts that PEFT adds, so that draws do not depend on adapters around the model."""
    runtime: Runtime
    """State that all layers of the model share."""
    stored: QuantizedWeight
    """The weight as the products see it; phases with one format of the weight share it."""
    activation_format: str | None = None
    """Format of the input; None means high precision."""
    forward_std: float = 0.0
    """Relative standard deviation of the noise on the forward product (fraction)."""
    backward_std: float = 0.0
    """Relative standard deviation of the noise on dX and dW (fraction)."""
    deadzone: float = 0.0
    """Threshold relative to the token's max(abs(x)) (fraction)."""
    gradient: GradientArithmetic | None = None
    """How the operands of the backward products are stored; None lets dX and dW pass straight through."""
    sums: PartialSums | None = None
    """How the products are summed; None means float32."""
    errors: ErrorModel | None = None
    """Errors besides the published noise; None means that there are none."""
    faults: tuple[InstalledFault, ...] = ()
    """Faults of the unit, in the order in which they apply."""
    is_output: bool = False
    """Whether this is the output embedding, which sees only the last tokens under `logits_to_keep`."""
    _keys: ProductKeys | None = field(default=None)
    """Keys under the base key of the last product."""
    plain_forward: bool = field(init=False)
    """Whether the forward pass is exactly F.linear with Q(W)."""
    is_chunked: bool = field(init=False)
    """Whether the sum of dW over the tokens depends on which of them are padding."""
    scale: Scale = field(init=False)
    """What the noise is relative to."""
    is_idle: bool = field(init=False)
    """Whether nothing is done to this Linear: the hardware of other phases computes it."""

    def __post_init__(self) -> None:
        changed = self.activation_format or self.forward_std or self.deadzone or self.faults or self.sums
        self.plain_forward = not (changed or (self.errors is not None and self.errors.changes_output))
        self.is_chunked = self.gradient is not None or self.sums is not None
        self.scale = "output" if self.errors is None else self.errors.scale
        self.is_idle = self.plain_forward and not (self.weight_format or self.backward_std or self.gradient)

    @property
    def weight_format(self) -> str | None:
        """Format of the weight; None means high precision."""
        return self.stored.format

    @property
    def needs_all_tokens(self) -> bool:
        """Whether the product of some tokens differs from theirs among all tokens: noise, or blocks along tokens."""
        return bool(self.forward_std or self.backward_std or self.is_chunked)

    def quantized_input(self, x: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, "*tokens in_features"]:
        """The input of the product: x after deadzone and format, without gradient."""
        if self.activation_format is None:
            return self.after_deadzone(x)
        return quantize(x.detach(), self.activation_format, tensor_scale="row", deadzone=self.deadzone)

    def after_deadzone(self, x: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, "*tokens in_features"]:
        """x after the deadzone, without gradient."""
        x = x.detach()
        return outside_of_deadzone(x, self.deadzone) if self.deadzone else x

    def shared_input(self, x: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, "*tokens in_features"]:
        """`quantized_input(x)`, computed only once for consecutive Linears with the same input (q, k, v)."""
        if self.activation_format is None or self.deadzone or x.is_inference() or torch.is_inference_mode_enabled():
            return self.quantized_input(x)
        shared = self.runtime.shared
        if shared is not None:
            source, version, fmt, result = shared
            if source() is x and version == x._version and fmt == self.activation_format:  # type: ignore[operator]
                return result
        result = self.quantized_input(x)
        self.runtime.shared = (weakref.ref(x), x._version, self.activation_format, result)
        return result

    def keys(self, base: Key) -> ProductKeys:
        """Keys of this Linear's products, derived from a base key."""
        keys = self._keys
        if keys is None or keys.base != base:
            fold = base.fold
            name = self.name
            keys = ProductKeys(base, fold(name, "forward"), fold(name, "dx"), fold(name, "dw"))
            self._keys = keys
        return keys

    def linear(
        self,
        x: Float[Tensor, "*tokens in_features"],
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, " out_features"] | None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "*tokens out_features"]:
        """The differentiable product on this hardware.

        Under `torch.autocast` it is computed in autocast's dtype, from `Q(W)` of the weight as it is stored.

        Args:
            x: the input.
            weight: the weight.
            bias: the bias, or None.
            draw: source of the noise; None takes it from the runtime (`noise_key`).
        """
        if torch.compiler.is_compiling():
            return _linear_outside_of_graphs(self, x, weight, bias, draw)
        stored = self.stored
        if stored.format is not None:
            stored.check_weights(x)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                low = stored.quantized(weight).to(dtype)
                return self._linear(x.to(dtype), weight, None if bias is None else bias.to(dtype), low, draw)
        return self._linear(x, weight, bias, stored.quantized(weight), draw)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: Tensor, draw: Draw | None) -> Tensor:
        grad = torch.is_grad_enabled()
        if self.is_chunked:
            self.runtime.check_padding(self.name)
        if self.plain_forward:
            if not grad or not (weight.requires_grad or self.backward_std or self.gradient):
                return F.linear(x, quantized, bias)
            grad = x.requires_grad or weight.requires_grad
            if not grad:
                return F.linear(x, quantized, bias)
        elif grad:
            grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        random = self.backward_std or (self.gradient is not None and self.gradient.stochastic)
        if draw is None and (self.forward_std or self.faults or (grad and random)):
            draw = self.runtime.current(self.name)
        elif draw is None and grad and self.is_chunked:
            draw = self.runtime.draw  # which tokens are padding
        if not grad:
            return self.product(self.shared_input(x), quantized, bias, draw)
        result: Tensor = _Product.apply(x, weight, bias, self.shared_input(x), quantized, self, draw)  # type: ignore
        return result

    def product(
        self,
        x: Float[Tensor, "*tokens in_features"],
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, " out_features"] | None,
        draw: Draw | None,
    ) -> Float[Tensor, "*tokens out_features"]:
        """The forward product of a quantized input and a quantized weight, with noise, bias and faults."""
        if self.sums is not None or self.errors is not None:
            y = self._with_errors(x, weight, draw)
            y = y if bias is None else y.add_(bias)
        elif not self.forward_std:
            y = F.linear(x, weight, bias)
        else:
            assert draw is not None
            y = F.linear(x, weight)
            rows = draw.rows_of(y.shape[:-1], self.name, last=self.is_output)
            matmul_noise(y, self.forward_std, self.keys(draw.key).forward, rows=rows, bias=bias, out=y)
        for index, fault in enumerate(self.faults):
            assert draw is not None
            rows = draw.rows_of(y.shape[:-1], self.name, last=self.is_output)
            y = fault.apply(y, self.keys(draw.key).forward.fold("fault", index), rows)
        return y

    def _with_errors(self, x: Tensor, weight: Tensor, draw: Draw | None) -> Tensor:
        """The forward product by the accumulator, with the errors of `error_models` and without bias."""
        y = self.summed(x, weight)
        if self.forward_std:
            assert draw is not None
            rows = draw.rows_of(y.shape[:-1], self.name, last=self.is_output)
            perturb(y, (x, weight), self.forward_std, self.scale, self.keys(draw.key).forward, rows=rows)
        return y if self.errors is None else self.errors.read(y, x, weight)

    def summed(self, a: Float[Tensor, "*rows k"], b: Float[Tensor, "columns k"]) -> Float[Tensor, "*rows columns"]:
        """`a @ b^T` by the accumulator, without noise."""
        if self.sums is None:
            return a.matmul(b.t())
        flat = accumulated(a.reshape(-1, a.shape[-1]), b, self.sums)
        return flat.view(*a.shape[:-1], b.shape[0])


_linear_outside_of_graphs = outside_of_graphs(LinearState.linear)


class _Product(torch.autograd.Function):
    """The products of the module's docstring: `qx` and `qw` are multiplied; x, weight and bias get the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        qx: Tensor,
        qw: Tensor,
        state: LinearState,
        draw: Draw | None,
    ) -> Tensor:
        # The weight is saved only for torch's version check: a weight that changes before backward is an error, as for
        # a plain Linear, and the buffer of Q(W) is overwritten only after such a change. Only dW needs Q(x).
        tag = None if draw is None else draw.tag
        kept = qx if state.gradient is None else state.after_deadzone(x)
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, qw, weight, tag)
        ctx.state, ctx.draw = state, draw
        y = state.product(qx, qw, bias, draw)
        # Some adapters (AdaLoRA) add to the output in place, which autograd refuses for a view made here.
        return y if y._base is None else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, qw, weight, tag = ctx.saved_tensors
        state: LinearState = ctx.state
        draw: Draw | None = ctx.draw
        if draw is not None:
            draw.check_tag(tag, state.name)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        std = state.backward_std
        dx = dw = db = None
        if needs_x:
            operands = _operands_of_dx(state, dy, qw, weight, draw)
            dx = state.summed(*operands)
            if std:
                assert draw is not None
                rows = draw.rows_of(dx.shape[:-1], state.name, last=state.is_output)
                perturb(dx, operands, std, state.scale, state.keys(draw.key).dx, rows=rows)
        flat = dy.reshape(-1, dy.shape[-1]) if needs_weight or needs_bias else dy
        if needs_weight:
            operands = _operands_of_dw(state, flat, kept.reshape(-1, kept.shape[-1]), draw, dy.shape[:-1])
            dw = state.summed(*operands)
            if std:
                assert draw is not None
                perturb(dw, operands, std, state.scale, state.keys(draw.key).dw.fold(draw.fingerprint))
        if needs_bias:
            db = flat.sum(0)
        return dx, dw, db, None, None, None, None


def _operands_of_dx(
    state: LinearState, dy: Tensor, qw: Tensor, weight: Tensor, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """a and b of `dX = a @ b^T`."""
    if state.gradient is None:
        return dy, qw.t()
    key = None if draw is None else state.keys(draw.key).dx.fold(draw.fingerprint)
    return state.gradient.for_dx(dy, key), state.stored.for_dx(weight, qw).t()


def _operands_of_dw(
    state: LinearState, dy: Tensor, kept: Tensor, draw: Draw | None, leading: torch.Size
) -> tuple[Tensor, Tensor]:
    """a and b of `dW = a @ b^T`, from dY [tokens, out_features] and the input that was kept."""
    real = None
    if draw is not None and state.is_chunked:
        real = draw.real_tokens(leading, state.name, last=state.is_output)
    if state.gradient is None:
        return (dy.t(), kept.t()) if real is None else (dy[real].t(), kept[real].t())
    key = None if draw is None else state.keys(draw.key).dw.fold(draw.fingerprint)
    return state.gradient.for_dw(dy, kept, state.activation_format, key, real)


class HardwareLinear(nn.Linear):
    """The class to which `install` switches each Linear; parameters, their names and the state dict stay the same."""

    hardware_state: LinearState

    def forward(
        self,
        input: Float[Tensor, "*tokens in_features"],  # noqa: A002 (the name that nn.Linear gives it)
    ) -> Float[Tensor, "*tokens out_features"]:
        """The product on the installed hardware, or exactly F.linear while it is off or does nothing here."""
        state = self.hardware_state
        if not state.runtime.on or state.is_idle:
            if "_is_replica" not in self.__dict__:  # DataParallel computes its replicas in threads
                state.runtime.check_thread(state.name)
            return F.linear(input, self.weight, self.bias)
        return state.linear(input, self.weight, self.bias)
