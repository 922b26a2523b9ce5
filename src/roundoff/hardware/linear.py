"""A Linear on simulated hardware: `Q(x) Q(W)^T` with noise on every product, and a straight-through backward pass.

    y  = noise(Q(x) Q(W)^T) + b, then the faults of the unit       key.fold(name, "forward")
    dX = noise(dY Q(W))                                            key.fold(name, "dx")
    dW = noise(dY^T Q(x))                                          key.fold(name, "dw", fingerprint of the rows)

- The bias is added after the noise, in the model's dtype, because it is not part of the matrix product.
- Activations are quantized with `tensor_scale="row"`: formats with a scale for the whole tensor (nvfp4, fp8_e4m3) use
  one scale per token, so that a token's result depends neither on padding nor on how the batch is split. For the same
  reason the deadzone is relative to the maximum of the token. The deadzone comes before the format.
- `dX` and `dW` pass straight through formats, deadzone and faults: the derivative of each counts as 1.
- `Q(W)` is kept in a buffer of its own, outside of the parameters, and is computed again only when the weight has
  changed (version counter, storage, address, dtype or device). torch does not count every write. A hook in
  `installed.py` counts the steps of fused optimizers; `freshness.py` detects the others, such as writes through
  `weight.data` and the steps of compiled optimizers, by the weight's memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roundoff.hardware.draw import Draw, Runtime
from roundoff.hardware.faults import InstalledFault
from roundoff.hardware.freshness import Part, part_name
from roundoff.hardware.graphs import outside_of_graphs
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


@dataclass(eq=False, slots=True, weakref_slot=True)
class LinearState:
    """What the hardware does to one Linear, and its cached `Q(W)`; it is no parameter and no buffer of the module."""

    name: str
    """Dotted name without the parts that PEFT adds, so that draws do not depend on adapters around the model."""
    runtime: Runtime
    """State that all layers of the model share."""
    weight_format: str | None = None
    """Format of the weight; None means high precision."""
    activation_format: str | None = None
    """Format of the input; None means high precision."""
    forward_std: float = 0.0
    """Relative standard deviation of the noise on the forward product (fraction)."""
    backward_std: float = 0.0
    """Relative standard deviation of the noise on dX and dW (fraction)."""
    deadzone: float = 0.0
    """Threshold relative to the token's max(abs(x)) (fraction)."""
    faults: tuple[InstalledFault, ...] = ()
    """Faults of the unit, in the order in which they apply."""
    is_output: bool = False
    """Whether this is the output embedding, which sees only the last tokens under `logits_to_keep`."""
    quantizations: int = 0
    """How often `Q(W)` was computed."""
    _cached: Tensor | None = None
    """`Q(W)`, valid only while `_cached_of` describes the weight."""
    _cached_of: tuple[int, int, torch.dtype, torch.device] | None = None
    """Version, address, dtype and device of the weight that `Q(W)` was computed from."""
    _cached_in: weakref.ref[torch.UntypedStorage] | None = None
    """Storage of that weight; needed because a later tensor of version 0 may get the same address."""
    _checked: int = -1
    """Value of `Part.checks` when this Linear was last computed."""
    _watched: Part | None = None
    """The part of `Freshness` that holds this weight; looked up at the first use."""
    _part: str = field(init=False)
    """Name of that part."""
    _keys: ProductKeys | None = field(default=None)
    """Keys under the base key of the last product."""
    plain_forward: bool = field(init=False)
    """Whether the forward pass is exactly F.linear with Q(W)."""

    def __post_init__(self) -> None:
        self._part = part_name(self.name)
        self.plain_forward = not (self.activation_format or self.forward_std or self.deadzone or self.faults)

    def quantized_weight(
        self, weight: Float[Tensor, "out_features in_features"]
    ) -> Float[Tensor, "out_features in_features"]:
        """`Q(W)`, from the cache unless the weight has changed; the weight itself if it has no format."""
        if self.weight_format is None:
            return weight.detach()
        tag = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        cached, storage = self._cached, self._cached_in
        if cached is None or storage is None or tag != self._cached_of or storage() is not weight.untyped_storage():
            if cached is not None and (cached.shape, cached.dtype, cached.device) != (
                weight.shape,
                weight.dtype,
                weight.device,
            ):
                cached = None
            self._cached_of = None  # an error below must not leave a half-written copy in use
            if torch.is_inference_mode_enabled():  # autograd does not accept a tensor made in inference mode
                with torch.inference_mode(False):
                    cached = self._cached = quantize(weight.detach(), self.weight_format, out=cached)
            else:
                cached = self._cached = quantize(weight.detach(), self.weight_format, out=cached)
            self._cached_of, self._cached_in = tag, weakref.ref(weight.untyped_storage())
            self.quantizations += 1
            self.runtime.freshness.record(self._watch(), self, weight)
        return cached

    def check_weights(self, x: Float[Tensor, "*tokens in_features"]) -> None:
        """Detect writes that torch did not count; call this before every product (it acts once in a pass)."""
        part = self._watched or self._watch()
        if self._checked == part.checks:  # computed since the last check, so a new pass has begun
            self.runtime.freshness.check(part, x.numel() // max(1, x.shape[-1]))
        self._checked = part.checks

    def _watch(self) -> Part:
        """The part of `Freshness` that holds this Linear's weight."""
        if self._watched is None:
            self._watched = self.runtime.freshness.part(self._part)
        return self._watched

    def refresh(self) -> None:
        """Discard `Q(W)`, so that the next product computes it again."""
        self._cached_of = None

    @property
    def cached_address(self) -> int:
        """Address of `Q(W)`, which stays where it is when it is computed again; 0 if there is none."""
        return 0 if self._cached is None else self._cached.data_ptr()

    @property
    def is_cached(self) -> bool:
        """Whether there is a `Q(W)` to use."""
        return self._cached_of is not None

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy (deepcopy, pickle), without `Q(W)`: the copy quantizes its own weight."""
        state = {slot.name: getattr(self, slot.name) for slot in fields(self)}
        return state | {"_cached": None, "_cached_of": None, "_cached_in": None, "_checked": -1, "_watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def quantized_input(self, x: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, "*tokens in_features"]:
        """The input of the product: x after deadzone and format, without gradient."""
        x = x.detach()
        if self.activation_format is None:
            return outside_of_deadzone(x, self.deadzone) if self.deadzone else x
        return quantize(x, self.activation_format, tensor_scale="row", deadzone=self.deadzone)

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

    def product(
        self,
        x: Float[Tensor, "*tokens in_features"],
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, " out_features"] | None,
        draw: Draw | None,
    ) -> Float[Tensor, "*tokens out_features"]:
        """The forward product of a quantized input and a quantized weight, with noise, bias and faults."""
        if not self.forward_std:
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
        ctx.save_for_backward(qx if ctx.needs_input_grad[1] else None, qw, weight, tag)
        ctx.state, ctx.draw = state, draw
        y = state.product(qx, qw, bias, draw)
        # Some adapters (AdaLoRA) add to the output in place, which autograd refuses for a view made here.
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
    """The class to which `install` switches each Linear; parameters, their names and the state dict stay the same."""

    hardware_state: LinearState

    def forward(
        self,
        input: Float[Tensor, "*tokens in_features"],  # noqa: A002 (the name that nn.Linear gives it)
    ) -> Float[Tensor, "*tokens out_features"]:
        """The product on the installed hardware, or exactly F.linear while the hardware is off."""
        state = self.hardware_state
        if not state.runtime.on:
            if "_is_replica" not in self.__dict__:  # DataParallel computes its replicas in threads
                state.runtime.check_thread(state.name)
            return F.linear(input, self.weight, self.bias)
        return state.linear(input, self.weight, self.bias)
