"""A forward pass for sampling that calls the model's own Linears and fuses everything between them.

On small models, most of a decode step is spent between the matrix products: a Llama-like layer performs about sixty
small tensor operations, of which seven are products. Here each gap (residual and norm; rotary embedding, cache and
attention; gate of the MLP) is one compiled kernel (`numerics/kernels/decode.h`). The Linears are called as they are,
with their hardware, adapters or faults, and attention with noise or formats goes through its own function. New keys
and values are quantized on their way into the cache where the hardware has a format for it, by the code of `quantize`.
What the chip does to the arithmetic is therefore the same in every pass.

The fused pass is used only where it is known to compute what the model computes: on a CPU in float32, for the model
classes in `FAMILIES` with their default activation, norm and rotary embedding, without forward hooks, and with a format
of the cache that the kernels know. Before its first use on a model, both passes are compared on a few tokens; they must
agree to float32 rounding. If they do not, a warning says so and the model's own pass is used, as it is where no
compiler is found.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.formats.table import get_format
from roundoff.hardware import attention, plain_arithmetic
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.models.masks import AttentionPattern, positions
from roundoff.numerics.backend import Kernels, kernels_for, thread_count
from roundoff.sampling.kv_cache import KVCache, KVCacheLayer, SharedCache

FAMILIES = ("Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Model classes that the fused pass can compute."""
HEAD_SIZES = (16, 32, 64, 128)
"""Head sizes that the kernels are compiled for."""
MOST_COLUMNS = 64
"""Longest prompt, in tokens, that the fused pass reads: its attention takes one query at a time."""
ROUNDING = 1e-4
"""Largest accepted difference of logits between the passes, relative to the largest logit: that of about 50 layers in
float32."""
MARK = "fused_decoder_agrees"
"""Attribute that a model gets when both passes were compared on it: whether they agree."""


@dataclass(eq=False, slots=True)
class FusedDecoder:
    """The fused pass of one model, for the positions of one call of `sample`."""

    model: PreTrainedModel
    kernels: Kernels
    layers: tuple[_Layer, ...]
    noisy_attention: bool
    """Whether attention goes through the hardware's function."""
    cosine: Float[Tensor, "positions head_size"]
    """Cosines of the rotary embedding."""
    sine: Float[Tensor, "positions head_size"]
    """Sines of the rotary embedding."""

    @classmethod
    def of(cls, model: PreTrainedModel, columns: int) -> FusedDecoder | None:
        """The fused pass for sequences of up to `columns` tokens; None where the model's own pass must be used."""
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        kernels = kernels_for(next(base.parameters()))
        if kernels is None or not _is_known(base):
            return None
        decoder = cls._on(base, kernels, columns)
        agrees = base.__dict__.get(MARK)
        if agrees is None:
            agrees = base.__dict__[MARK] = decoder._agrees()
        return decoder if agrees else None

    @classmethod
    def _on(cls, base: PreTrainedModel, kernels: Kernels, columns: int) -> FusedDecoder:
        decoder: Any = base.model
        cosine, sine = decoder.rotary_emb(decoder.embed_tokens.weight, torch.arange(columns)[None])
        noisy = base.config._attn_implementation == attention.NAME
        formats = attention.cache_formats(base)
        windows = AttentionPattern.of(base).windows(base.config)
        layers = tuple(
            _Layer.of(layer, window, formats.get(index, AttentionFormats()))
            for index, (layer, window) in enumerate(zip(decoder.layers, windows, strict=True))
        )
        return cls(base, kernels, layers, noisy, cosine[0].contiguous(), sine[0].contiguous())

    def reads(self, columns: int) -> bool:
        """Whether the fused pass reads prompts of this many columns; if not, the model's own pass does."""
        return columns <= MOST_COLUMNS and not self.noisy_attention

    def logits(
        self,
        tokens: Int[Tensor, "rows columns"],
        left: Int[Tensor, " rows"],
        cache: KVCache | SharedCache,
        mask: Any,
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits that follow the last column of `tokens`, the new columns. They are added to the cache.

        Args:
            tokens: ids of the new tokens.
            left: columns of left padding.
            cache: holds the columns so far.
            mask: for the hardware's attention; ignored where attention is not noisy.
        """
        decoder = self.model.model
        B, Q = tokens.shape
        hidden = F.embedding(tokens.reshape(-1), decoder.embed_tokens.weight)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x = self._norm(hidden, delta, layer.norm_before)
            q, k, v = _linear(layer.q, x), _linear(layer.k, x), _linear(layer.v, x)
            size = layer.attention.head_dim
            place = _Place.of(cache, index, B, k.shape[1] // size, size, k)
            mixed = self._attend(layer, place, (q, k, v), left, (B, Q), mask)
            x = self._norm(hidden, _linear(layer.o, mixed), layer.norm_after)
            gate, up = _linear(layer.gate, x), _linear(layer.up, x)
            self.kernels.gate(gate.data_ptr(), up.data_ptr(), gate.numel(), thread_count(gate.numel()))
            delta = _linear(layer.down, gate)
        x = self._norm(hidden, delta, decoder.norm)
        return _linear(self.model.lm_head, x.view(B, Q, -1)[:, -1] if Q > 1 else x)

    def _norm(self, hidden: Tensor, delta: Tensor | None, norm: Any) -> Tensor:
        """Add `delta` to `hidden` in place, and return the norm of the sum."""
        out = torch.empty_like(hidden)
        self.kernels.norm(
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            norm.weight.data_ptr(),
            norm.variance_epsilon,
            out.data_ptr(),
            *hidden.shape,
            thread_count(hidden.numel()),
        )
        return out

    def _attend(
        self,
        layer: _Layer,
        place: _Place,
        qkv: tuple[Tensor, Tensor, Tensor],
        left: Tensor,
        shape: tuple[int, int],
        mask: Any,
    ) -> Tensor:
        """Attention output [B*Q, H*D] of the new columns, whose keys and values are added to the cache."""
        B, Q = shape
        module = layer.attention
        q, D, own = qkv[0], module.head_dim, place.own
        out = None if self.noisy_attention else torch.empty_like(q)
        start, prompt = place.start, place.prompt
        kv_heads, capacity = own.keys.shape[1], own.keys.shape[2]
        tensors = *qkv, out, *((None, None) if prompt is None else (prompt.keys, prompt.values)), own.keys, own.values
        width = 0 if prompt is None else prompt.keys.shape[2]
        self.kernels.attend(
            _pointers(*tensors, self.cosine, self.sine),
            _pointers(place.prompt_row, place.own_row, left),
            (ctypes.c_int64 * 9)(B, Q, q.shape[1] // D, kv_heads, start, layer.window, width, capacity, D),
            module.scaling,
            None if layer.formats.cache is None else get_format(layer.formats.cache).packed,
            torch.get_num_threads(),
        )
        own.length += Q
        if out is not None:
            return out
        keys, values = layer.formats.hand_over(*(x.narrow(2, 0, own.length) for x in (own.keys, own.values)))
        if isinstance(mask, dict):
            mask = mask[module.layer_type]
        queries = q.view(B, Q, -1, D).transpose(1, 2)
        mixed, _ = attention.attention_forward(module, queries, keys, values, mask, scaling=module.scaling)
        return mixed.view(B * Q, -1)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether both passes agree on a padded batch, for a prompt and one step, with hardware off."""
        with plain_arithmetic(self.model):
            return FusedDecoder._on(self.model, self.kernels, 8)._agrees_as_it_is()

    def _agrees_as_it_is(self) -> bool:
        vocabulary, layers = self.model.config.vocab_size, self.model.config.num_hidden_layers
        tokens = torch.arange(3, 3 + 2 * 6).view(2, 6) * 7919 % vocabulary
        left, pattern = torch.tensor([0, 2]), AttentionPattern.of(self.model)
        own, fused = KVCache(layers, 6), KVCache(layers, 6)
        for start, end in ((0, 5), (5, 6)):
            masks = pattern.masks(torch.arange(start, end), left, end, self.model.dtype)
            expected = self.model(
                input_ids=tokens[:, start:end],
                attention_mask=masks,
                position_ids=positions(left, end)[:, start:],
                past_key_values=own,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logits = self.logits(tokens[:, start:end].contiguous(), left, fused, masks)
            tolerance = ROUNDING * float(expected.abs().nan_to_num(0.0, 0.0).max())
            if not torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True):
                logging.getLogger("roundoff").warning(
                    "roundoff: the fused pass does not compute what %s computes; using the model's own, slower one",
                    type(self.model).__name__,
                )
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of a decoder layer, looked up once."""

    norm_before: nn.Module
    attention: Any
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm_after: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    window: int
    """Columns that its attention sees, the query's own included; 0 means all."""
    formats: AttentionFormats
    """Format of its cache."""

    @classmethod
    def of(cls, layer: Any, window: int, formats: AttentionFormats) -> _Layer:
        attended, mlp = layer.self_attn, layer.mlp
        projections = attended.q_proj, attended.k_proj, attended.v_proj, attended.o_proj
        gated = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        return cls(
            layer.input_layernorm, attended, *projections, layer.post_attention_layernorm, *gated, window, formats
        )


@dataclass(eq=False, slots=True)
class _Place:
    """Where one layer reads keys and values, and writes new ones."""

    own: KVCacheLayer
    start: int
    """Columns that the cache already holds, prompt included."""
    prompt: KVCacheLayer | None = None
    prompt_row: Tensor | None = None
    own_row: Tensor | None = None

    @classmethod
    def of(cls, cache: KVCache | SharedCache, layer: int, rows: int, heads: int, size: int, like: Tensor) -> _Place:
        own = cache.own.stack[layer] if isinstance(cache, SharedCache) else cache.stack[layer]
        if not own.is_initialized:
            most = cache.capacity if isinstance(cache, SharedCache) else rows
            own.lazy_initialization(like.new_empty(most, heads, 0, size))
        if not isinstance(cache, SharedCache):
            return cls(own, own.length)
        prompt = cache.prompts.stack[layer]
        return cls(own, own.length + prompt.length, prompt, cache.prompt_row, cache.own_row)


def _pointers(*tensors: Tensor | None) -> Any:
    """Addresses as a C array, with null for None."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """The product of a Linear with its hardware or adapters; a plain Linear is computed without module overhead."""
    if type(module) is nn.Linear:
        return F.linear(x, module.weight, module.bias)
    product: Tensor = module(x)
    return product.contiguous()


def _is_known(base: PreTrainedModel) -> bool:
    """Whether the model is one of `FAMILIES` as transformers builds it, in float32 and without forward hooks."""
    name, config = type(base).__name__, base.config
    if name not in FAMILIES or not type(base).__module__.startswith("transformers.models."):
        return False
    rotary: Callable[..., Any] = base.model.rotary_emb
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    head = base.model.layers[0].self_attn.head_dim
    return (
        config.hidden_act == "silu"
        and kind in ("default", "linear", "llama3")
        and head in HEAD_SIZES
        and all(get_format(str(formats.cache)).has_kernel for formats in attention.cache_formats(base).values())
        and 2 * rotary.inv_freq.numel() == head  # type: ignore[attr-defined]
        and config._attn_implementation in ("sdpa", "eager", attention.NAME, attention.CACHE_NAME)
        and all(p.dtype == torch.float32 and p.is_contiguous() for p in base.parameters())
        and not any(_is_watched(module) for module in base.modules())
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
