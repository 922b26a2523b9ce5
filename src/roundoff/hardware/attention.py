"""Attention on simulated hardware: formats of its operands and noise on QK^T and PV, through transformers' interface.

    scores = noise(Q K^T) * scaling, then soft cap and mask, softmax in float32, out = noise(P V)
    dP = noise(dO V^T)   dV = noise(P^T dO)   dQ = noise(dS K)   dK = noise(dS^T Q)

Q, K, P and V are quantized as `attention_formats` says, in the backward pass as in the forward pass. Where only the
cache has a format, nothing but K and V changes, and transformers' `sdpa` computes the rest as in the plain model.

Scores are perturbed before the mask is added, so that no infinity is multiplied. The query heads that share a key head
(grouped-query attention) are one product, as on hardware that reads the cache once, so `dK` and `dV` are perturbed
after the sum over these heads. Row ids are `token row * heads + head`. The columns of the scores are numbered by the
logical position of the key, so that left padding and a growing cache give the draws of the unpadded pass. A static
cache has unused places after the query, which shift these columns: the noise has the same distribution, but a pass
without a cache does not replay it. The scores [rollouts, heads, queries, keys] are in memory as a whole, as in the
`eager` attention of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roundoff.config import Hardware
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.hardware.draw import Draw
from roundoff.hardware.error_models import Scale, perturb
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.hardware.row_ids import AttentionRows
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.rng import Key

NAME = "roundoff"
"""Name of the attention function and of its mask in transformers' registries."""
CACHE_NAME = "roundoff_sdpa"
"""The same of the function for models under `sdpa` of which only the cache has a format."""
STATE = "hardware_attention_state"
"""Attribute of an attention module that holds its `AttentionState`."""
PRODUCTS = ("scores", "scores_dq", "scores_dk", "mix", "mix_dp", "mix_dv")
"""Names of the products, which enter their keys: QK^T, dQ, dK, PV, dP and dV."""


@dataclass(eq=False, slots=True)
class AttentionState:
    """The noise on the products of one attention layer, and the formats of their operands."""

    name: str
    """Dotted name of the layer, without the parts that PEFT adds."""
    runtime: Runtime
    """State that all layers of the model share."""
    forward_std: float
    """Relative standard deviation on QK^T and PV (fraction)."""
    backward_std: float
    """Relative standard deviation on the four products of the backward pass (fraction)."""
    scale: Scale = "output"
    """What the noise is relative to; never `row`, because a row of scores includes masked keys and padding."""
    formats: AttentionFormats = field(default_factory=AttentionFormats)
    """Formats of the cache and of the operands."""
    _base: Key | None = field(default=None)
    _keys: dict[str, Key] = field(default_factory=dict)

    def key(self, base: Key, product: str) -> Key:
        """Key of one of the `PRODUCTS` of this layer, derived from a base key."""
        if self._base != base:
            self._keys = {name: base.fold(self.name, name) for name in PRODUCTS}
            self._base = base
        return self._keys[product]


@dataclass(eq=False, slots=True)
class _Call:
    """One call of one layer: its state, its draw and its row ids."""

    state: AttentionState
    draw: Draw | None
    rows: AttentionRows | None

    def product(self, a: Tensor, b: Tensor, std: float, name: str) -> Tensor:
        """`a @ b` with noise; `name` is one of the `PRODUCTS`.

        The rows of dK and dV are keys, those of the other products are queries. The columns of the scores and of dP
        are keys, and are numbered by logical position.
        """
        y = a.matmul(b)
        if not std:
            return y
        assert self.draw is not None
        rows, start = None, None
        if self.rows is not None:
            rows = self.rows.key if name in ("scores_dk", "mix_dv") else self.rows.query
            start = self.rows.column_start if name in ("scores", "mix_dp") else None
        key = self.state.key(self.draw.key, name)
        return perturb(y, (a, b.transpose(2, 3)), std, self.state.scale, key, rows=rows, column_start=start)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """noise(Q K^T), for queries [rollouts, key_heads, grouped_queries, head_size]."""
        return self.product(query, keys.transpose(2, 3), self.state.forward_std, "scores")

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """noise(P V), for attention weights [rollouts, key_heads, grouped_queries, keys]."""
        return self.product(weights, values, self.state.forward_std, "mix")


class _Scores(torch.autograd.Function):
    """noise(Q K^T), whose backward pass adds noise to dQ and dK."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(query, keys)
        ctx.call = call
        return call.scores(query, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        query, keys = ctx.saved_tensors
        call: _Call = ctx.call
        std = call.state.backward_std
        dq = call.product(ds, keys, std, "scores_dq") if ctx.needs_input_grad[0] else None
        dk = call.product(ds.transpose(2, 3), query, std, "scores_dk") if ctx.needs_input_grad[1] else None
        return dq, dk, None


class _Mix(torch.autograd.Function):
    """noise(P V), whose backward pass adds noise to dP and dV."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(weights, values)
        ctx.call = call
        return call.mix(weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        weights, values = ctx.saved_tensors
        call: _Call = ctx.call
        std = call.state.backward_std
        dp = call.product(do, values.transpose(2, 3), std, "mix_dp") if ctx.needs_input_grad[0] else None
        dv = call.product(weights.transpose(2, 3), do, std, "mix_dv") if ctx.needs_input_grad[1] else None
        return dp, dv, None


@outside_of_graphs
def attention_forward(
    module: nn.Module,
    query: Float[Tensor, "rollouts heads queries head_size"],
    key: Float[Tensor, "rollouts key_heads keys head_size"],
    value: Float[Tensor, "rollouts key_heads keys value_size"],
    attention_mask: Shaped[Tensor, " ..."] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Float[Tensor, "rollouts queries heads value_size"], Float[Tensor, "rollouts heads queries keys"]]:
    """Compute attention on hardware; transformers calls this for every attention layer of an installed model.

    Args:
        module: the attention module, which holds an `AttentionState`.
        query: queries after the position embedding.
        key: keys after the position embedding; several query heads may share a key head.
        value: values.
        attention_mask: additive mask, or boolean mask that is true where a query sees a key; it broadcasts to
            [rollouts, heads, queries, keys].
        dropout: probability that an attention weight is dropped.
        scaling: factor of the scores; default `head_size ** -0.5`.
        is_causal: whether to mask later keys if there is no `attention_mask`; default: the module's attribute.
        softcap: bound of the scores, as `tanh(scores / softcap) * softcap`.
        other: further arguments of transformers, which have no effect here.

    Returns:
        The output, and the attention weights after dropout.

    Raises:
        NotImplementedError: for a model with attention sinks or a learned position bias.
        RuntimeError: if no hardware is installed on the module.
    """
    for name in ("s_aux", "position_bias"):
        if other.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} uses {name}, which attention on hardware does not support: "
                "set hardware.matmul_noise.attention = false, and no hardware.precision.attention or kv_cache"
            )
    state = _state_of(module)
    formats = state.formats
    key, value = (formats.key_operand(x) for x in formats.read_back(key, value))
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    call = _Call(state, None, None)
    if state.forward_std or (grad and state.backward_std):
        call.draw = state.runtime.current(state.name)
        call.rows = call.draw.attention_rows(state.name, query.shape, key.shape)

    packed = formats.operand(query).reshape(batch, key_heads, heads // key_heads * queries, size)
    noisy_grad = grad and bool(state.backward_std or state.forward_std)
    scores: Tensor = _Scores.apply(packed, key, call) if noisy_grad else call.scores(packed, key)  # type: ignore
    scores = scores.view(batch, heads, queries, keys) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = _masked(scores, attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, p=dropout, training=module.training)
    flat = formats.operand(weights).view(batch, key_heads, -1, keys)
    out: Tensor = _Mix.apply(flat, value, call) if noisy_grad else call.mix(flat, value)  # type: ignore
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


@outside_of_graphs
def cached_attention(
    module: nn.Module,
    query: Float[Tensor, "rollouts heads queries head_size"],
    key: Float[Tensor, "rollouts key_heads keys head_size"],
    value: Float[Tensor, "rollouts key_heads keys value_size"],
    attention_mask: Shaped[Tensor, " ..."] | None,
    **other: Any,
) -> tuple[Float[Tensor, "rollouts queries heads value_size"], None]:
    """Compute attention by transformers' `sdpa` over keys and values as the cache stores them; see `attention_forward`.

    Raises:
        RuntimeError: if no hardware is installed on the module, or if the model changes what its cache returned.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = _state_of(module).formats.read_back(key, value)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **other)
    return result


def _state_of(module: nn.Module) -> AttentionState:
    state: AttentionState | None = getattr(module, STATE, None)
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__} is configured to compute attention on hardware, but none is installed on it: its "
            "config was copied from an installed model; install the hardware on this model, too"
        )
    return state


def cache_formats(model: nn.Module) -> dict[int, AttentionFormats]:
    """The formats of the attention layers whose cache has one, by index of the layer; none while the hardware is off.

    A cache that passes new keys and values through `in_cache`, and hands over what it returns, spares attention from
    quantizing all columns at every step.
    """
    found: dict[int, AttentionFormats] = {}
    for module in model.modules():
        state: AttentionState | None = module.__dict__.get(STATE)
        if state is not None and state.formats.cache is not None and state.runtime.on:
            found[module.layer_idx] = state.formats  # type: ignore[index]
    return found


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores [rollouts, heads, queries, keys] with the hidden keys far below zero."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        if not is_causal or queries == 1:
            return scores
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def function_name(original: str | None, hardware: Hardware) -> str:
    """The name of the attention function for a model under the `original` implementation."""
    return NAME if hardware.changes_attention or original != "sdpa" else CACHE_NAME


def register() -> None:
    """Register the attention functions and their masks with transformers; idempotent."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    AttentionInterface.register(CACHE_NAME, cached_attention)
    AttentionMaskInterface.register(CACHE_NAME, sdpa_mask)
