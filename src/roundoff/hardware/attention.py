"""Attention on simulated hardware: noise on QK^T and PV, through transformers' attention interface.

    scores = noise(Q K^T) * scaling, then soft cap and mask, softmax in float32, out = noise(P V)
    dP = noise(dO V^T)   dV = noise(P^T dO)   dQ = noise(dS K)   dK = noise(dS^T Q)

Scores are perturbed before the mask is added, so that no infinity is multiplied. The query heads that share a key head
(GQA) are one product, as on hardware that reads the cache once: `dK` and `dV` are perturbed after the sum over them.
Row ids are `token row * heads + head`; the columns of scores are numbered by the logical position of the key, so that
left padding and a growing cache see the draws of the unpadded pass. (A static cache, whose unused places lie after the
query, shifts these columns by their number: noise as good, but not the one that a pass without cache replays.)
Scores are held as a whole [B, H, Q, S], as in transformers' `eager`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roundoff.hardware.draw import AttentionRows, Draw, Runtime
from roundoff.hardware.graphs import outside_of_graphs
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.rng import Key

NAME = "roundoff"
"""Name of the attention function and of its mask in transformers' registries."""
STATE = "hardware_attention_state"
PRODUCTS = ("scores", "scores_dq", "scores_dk", "mix", "mix_dp", "mix_dv")


@dataclass(eq=False, slots=True)
class AttentionState:
    """What the hardware does to the products of one attention layer."""

    name: str
    runtime: Runtime
    forward_std: float
    backward_std: float
    _base: Key | None = field(default=None)
    _keys: dict[str, Key] = field(default_factory=dict)

    def key(self, base: Key, product: str) -> Key:
        """Key of one product of this layer under a base key."""
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

    def perturb(self, y: Tensor, std: float, product: str) -> Tensor:
        """Noise on a product, in place; scores and dP by query and key position, dK and dV by key, others by query."""
        if not std:
            return y
        assert self.draw is not None
        key = self.state.key(self.draw.key, product)
        if self.rows is None:
            return matmul_noise(y, std, key, out=y)
        if product in ("scores_dk", "mix_dv"):
            return matmul_noise(y, std, key, rows=self.rows.key, out=y)
        start = self.rows.column_start if product in ("scores", "mix_dp") else None
        return matmul_noise(y, std, key, rows=self.rows.query, column_start=start, out=y)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """noise(Q K^T), [B, K, R, S] for queries [B, K, R, D] and keys [B, K, S, D]."""
        return self.perturb(query.matmul(keys.transpose(2, 3)), self.state.forward_std, "scores")

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """noise(P V), [B, K, R, D] for weights [B, K, R, S] and values [B, K, S, D]."""
        return self.perturb(weights.matmul(values), self.state.forward_std, "mix")


class _Scores(torch.autograd.Function):
    """noise(Q K^T) with noise on dQ and dK."""

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
        dq = call.perturb(ds.matmul(keys), std, "scores_dq") if ctx.needs_input_grad[0] else None
        dk = call.perturb(ds.transpose(2, 3).matmul(query), std, "scores_dk") if ctx.needs_input_grad[1] else None
        return dq, dk, None


class _Mix(torch.autograd.Function):
    """noise(P V) with noise on dP and dV."""

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
        dp = call.perturb(do.matmul(values.transpose(2, 3)), std, "mix_dp") if ctx.needs_input_grad[0] else None
        dv = call.perturb(weights.transpose(2, 3).matmul(do), std, "mix_dv") if ctx.needs_input_grad[1] else None
        return dp, dv, None


@outside_of_graphs
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """Attention [B, Q, H, D] and its weights [B, H, Q, S] for queries [B, H, Q, D], keys and values [B, K, S, D].

    Raises:
        NotImplementedError: for a model with attention sinks or a learned position bias.
    """
    for name in ("s_aux", "position_bias"):
        if other.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} uses {name}, which noisy attention does not support: "
                "set hardware.matmul_noise.attention = false"
            )
    found: AttentionState | None = getattr(module, STATE, None)
    if found is None:
        raise RuntimeError(
            f"{type(module).__name__} computes attention as installed hardware does, but none is installed on it: its "
            "config was copied from an installed model; install the hardware on this model, too"
        )
    state = found
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    call = _Call(state, None, None)
    if state.forward_std or (grad and state.backward_std):
        call.draw = state.runtime.current(state.name)
        call.rows = call.draw.attention_rows(state.name, query.shape, key.shape)

    packed = query.reshape(batch, groups, heads // groups * queries, size)
    noisy_grad = grad and bool(state.backward_std or state.forward_std)
    scores: Tensor = _Scores.apply(packed, key, call) if noisy_grad else call.scores(packed, key)  # type: ignore
    scores = scores.view(batch, heads, queries, keys) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = _masked(scores, attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, p=dropout, training=module.training)
    flat = weights.view(batch, groups, -1, keys)
    out: Tensor = _Mix.apply(flat, value, call) if noisy_grad else call.mix(flat, value)  # type: ignore
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores [B, H, Q, S] with what must not be seen far below zero; the mask is additive or boolean (true: seen)."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        if not is_causal or queries == 1:
            return scores
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def register() -> None:
    """Make the attention function and its (additive) mask known to transformers; a second call changes nothing."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)
