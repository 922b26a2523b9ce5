"""A Linear on simulated hardware: forward `Q(x) Q(W)^T`, with noise on every product; straight-through backward.

    y  = noise(Q(x) Q(W)^T) + b, then the faults of the unit       key.fold(name, "forward")
    dX = noise(dY Q(W))                                            key.fold(name, "dx")
    dW = noise(dY^T Q(x))                                          key.fold(name, "dw", fingerprint of the rows)

- The product is perturbed, then the bias is added in the model's dtype: the bias is no part of the matrix product.
- Activations are quantized with `tensor_scale="row"`: formats with a scale of the whole tensor (nvfp4, fp8_e4m3) take
  one scale a token, so that a token's result depends neither on padding nor on how the batch is split. The deadzone's
  maximum is that of the token for the same reason. Deadzone first, then the format.
- `dX` and `dW` pass straight through formats, deadzone and faults (their derivative counts as 1).
- `Q(W)` is kept in a buffer of its own beside the parameters and computed again only when the weight has changed
  (version counter, storage, address, dtype or device). torch does not count every write: not those through
  `weight.data`, nor the steps of fused or compiled optimizers. `freshness.py` notices those by the weight's memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roundoff.hardware.draw import Draw, Runtime
from roundoff.hardware.faults import InstalledFault
from roundoff.hardware.freshness import Part, part_name
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

LINEAR_STATE = "hardware_state"
"""Attribute of a Linear on hardware that holds its `LinearState`."""


@dataclass(frozen=True, slots=True)
class ProductKeys:
    """Keys of the three products of one Linear under one base key."""

    base: Key
    forward: Key
    dx: Key
    dw: Key


@dataclass(eq=False, slots=True, weakref_slot=True)
class LinearState:
    """What the hardware does to one Linear, and its cached `Q(W)`; kept outside of parameters and buffers."""

    name: str
    """Dotted name without what PEFT adds: draws do not depend on whether adapters wrap the model."""
    runtime: Runtime
    weight_format: str | None = None
    activation_format: str | None = None
    forward_std: float = 0.0
    backward_std: float = 0.0
    deadzone: float = 0.0
    """Threshold relative to the token's max(abs(x)) (fraction)."""
    faults: tuple[InstalledFault, ...] = ()
    is_output: bool = False
    """Whether this is the output embedding, which `logits_to_keep` gives the last tokens only."""
    quantizations: int = 0
    """How often `Q(W)` was computed."""
    _cached: Tensor | None = None
    _cached_of: tuple[int, int, torch.dtype, torch.device] | None = None
    _cached_in: weakref.ref[torch.UntypedStorage] | None = None
    """Where the weight lay: another tensor of version 0 may come to lie at the same address."""
    _checked: int = -1
    """The check of its layer's weights (`Part.checks`) that this Linear was last computed after."""
    _watched: Part | None = None
    """What watches the weights of its layer; found at the first use."""
    _part: str = field(init=False)
    """The layer that it is checked with."""
    _keys: ProductKeys | None = field(default=None)
    plain_forward: bool = field(init=False)
    """Whether the forward pass is exactly F.linear on Q(W)."""

    def __post_init__(self) -> None:
        self._part = part_name(self.name)
        self.plain_forward = not (self.activation_format or self.forward_std or self.deadzone or self.faults)

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """`Q(W)` [out, in]: from the cache unless the weight has changed since."""
        if self.weight_format is None:
            return weight.detach()
        tag = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        cached, lay = self._cached, self._cached_in
        if cached is None or lay is None or tag != self._cached_of or lay() is not weight.untyped_storage():
            if cached is not None and (cached.shape, cached.dtype, cached.device) != (
                weight.shape,
                weight.dtype,
                weight.device,
            ):
                cached = None
            self._cached_of = None  # an error below must not leave a half-written copy in use
            with torch.inference_mode(False):  # autograd takes no copy that was made in inference mode
                cached = self._cached = quantize(weight.detach(), self.weight_format, out=cached)
            self._cached_of, self._cached_in = tag, weakref.ref(weight.untyped_storage())
            self.quantizations += 1
            self.runtime.freshness.record(self._watch(), self, weight)
        return cached

    def check_weights(self, x: Tensor) -> None:
        """Before the first product of a pass, or of a layer in it: notice writes that torch does not count."""
        part = self._watched or self._watch()
        if self._checked == part.checks:  # computed since the last check, so a new pass has begun
            self.runtime.freshness.check(part, x.numel() // max(1, x.shape[-1]))
        self._checked = part.checks

    def _watch(self) -> Part:
        """The watched weights of this Linear's layer."""
        if self._watched is None:
            self._watched = self.runtime.freshness.part(self._part)
        return self._watched

    def refresh(self) -> None:
        """Forget `Q(W)`."""
        self._cached_of = None

    @property
    def is_cached(self) -> bool:
        """Whether `Q(W)` is held."""
        return self._cached_of is not None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy (deepcopy, pickle) takes over: it quantizes its own weight."""
        state = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        return state | {"_cached": None, "_cached_of": None, "_cached_in": None, "_checked": -1, "_watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def quantized_input(self, x: Tensor) -> Tensor:
        """What enters the product: x after deadzone and format, without gradient."""
        x = x.detach()
        if self.deadzone:
            size = x.abs()
            x = x.masked_fill(size < self.deadzone * size.amax(-1, keepdim=True), 0.0)
        return x if self.activation_format is None else quantize(x, self.activation_format, tensor_scale="row")

    def shared_input(self, x: Tensor) -> Tensor:
        """`quantized_input(x)`, computed once for the Linears that see the same x one after the other (q, k, v)."""
        if self.activation_format is None or self.deadzone or x.is_inference() or torch.is_inference_mode_enabled():
            return self.quantized_input(x)
        shared = self.runtime.shared
        if shared is not None:
            of, version, fmt, result = shared
            if of() is x and version == x._version and fmt == self.activation_format:  # type: ignore[operator]
                return result
        result = self.quantized_input(x)
        self.runtime.shared = (weakref.ref(x), x._version, self.activation_format, result)
        return result

    def keys(self, base: Key) -> ProductKeys:
        """Keys of this Linear's products under a base key."""
        keys = self._keys
        if keys is None or keys.base != base:
            fold = base.fold
            name = self.name
            keys = ProductKeys(base, fold(name, "forward"), fold(name, "dx"), fold(name, "dw"))
            self._keys = keys
        return keys

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, draw: Draw | None = None) -> Tensor:
        """The product on this hardware, [..., out], differentiable; `draw` None: that of the runtime."""
        if torch.compiler.is_compiling():
            return _linear_outside_of_graphs(self, x, weight, bias, draw)
        if self.weight_format is not None:
            self.check_weights(x)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                low = self.quantized_weight(weight).to(dtype)
                return self._linear(x.to(dtype), weight, None if bias is None else bias.to(dtype), low, draw)
        return self._linear(x, weight, bias, self.quantized_weight(weight), draw)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: Tensor, draw: Draw | None) -> Tensor:
        grad = torch.is_grad_enabled()
        if self.plain_forward:
            if not grad or not (weight.requires_grad or self.backward_std):
                return F.linear(x, quantized, bias)
            grad = x.requires_grad or weight.requires_grad
            if not grad:
                return F.linear(x, quantized, bias)
        elif grad:
            grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if draw is None and (self.forward_std or self.faults or (grad and self.backward_std)):
            draw = self.runtime.current(self.name)
        if not grad:
            return self.product(self.shared_input(x), quantized, bias, draw)
        result: Tensor = _Product.apply(x, weight, bias, self.shared_input(x), quantized, self, draw)  # type: ignore
        return result

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, draw: Draw | None) -> Tensor:
        """Forward product of what is quantized already, with noise, bias and faults."""
        if not self.forward_std:
            y = F.linear(x, weight, bias)
        else:
            assert draw is not None
            y = F.linear(x, weight)
            rows = draw.rows_of(y.shape[:-1], self.name, last=self.is_output)
            matmul_noise(y, self.forward_std, self.keys(draw.key).forward, rows=rows, out=y)
            if bias is not None:
                y += bias
        for index, fault in enumerate(self.faults):
            assert draw is not None
            rows = draw.rows_of(y.shape[:-1], self.name, last=self.is_output)
            y = fault.apply(y, self.keys(draw.key).forward.fold("fault", index), rows)
        return y


_linear_outside_of_graphs = outside_of_graphs(LinearState.linear)


class _Product(torch.autograd.Function):
    """See the module's docstring; x, weight and bias receive gradients, `qx` and `qw` are what was multiplied."""

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
        # The weight is saved for torch's version check alone: a weight changed before backward is an error, as it is
        # for a plain Linear, and Q(W)'s buffer is rewritten only after such a change. Q(x) is of use to dW alone.
        tag = None if draw is None else draw.tag
        ctx.save_for_backward(qx if ctx.needs_input_grad[1] else None, qw, weight, tag)
        ctx.state, ctx.draw = state, draw
        y = state.product(qx, qw, bias, draw)
        # A view made here could not be added to in place, which some adapters do (AdaLoRA).
        return y if y._base is None else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qx, qw, _, tag = ctx.saved_tensors
        state: LinearState = ctx.state
        draw: Draw | None = ctx.draw
        if draw is not None:
            draw.check_tag(tag, state.name)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        std = state.backward_std
        dx = dw = db = None
        if needs_x:
            dx = dy.matmul(qw)
            if std:
                assert draw is not None
                rows = draw.rows_of(dx.shape[:-1], state.name, last=state.is_output)
                matmul_noise(dx, std, state.keys(draw.key).dx, rows=rows, out=dx)
        flat = dy.reshape(-1, dy.shape[-1]) if needs_weight or needs_bias else dy
        if needs_weight:
            dw = flat.t().matmul(qx.reshape(-1, qx.shape[-1]))
            if std:
                assert draw is not None
                matmul_noise(dw, std, state.keys(draw.key).dw.fold(draw.fingerprint), out=dw)
        if needs_bias:
            db = flat.sum(0)
        return dx, dw, db, None, None, None, None


class HardwareLinear(nn.Linear):
    """A Linear whose class was swapped by `install`; parameters, names and state dict are those of the plain one."""

    hardware_state: LinearState

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        """`input` [..., in] -> [..., out] on the installed hardware, or exactly F.linear while it is off."""
        state = self.hardware_state
        if not state.runtime.on:
            if "_is_replica" not in self.__dict__:  # DataParallel computes its replicas in threads
                state.runtime.check_thread(state.name)
            return F.linear(input, self.weight, self.bias)
        return state.linear(input, self.weight, self.bias)
