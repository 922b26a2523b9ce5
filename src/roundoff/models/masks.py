"""Positions, row ids and attention masks of left-padded rollouts: one source for sampling and for training passes.

The columns of a rollout are `left` columns of padding, its prompt, its response, then padding again. A position is
counted without padding, so that it is the same in any batch:

    column    0    1    2    3    4    5    6
    token   pad  pad    3    -    1    =    2          left = 2
    position  0    0    0    1    2    3    4

Masks are additive 4-D tensors, prepared here because `transformers` would rebuild them for each decode step. They
forbid attention to later columns, to padding, and in sliding-window layers to columns that are `sliding_window` or more
columns back, as `transformers.masking_utils.sliding_window_overlay` defines it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.config import ConfigError
from roundoff.hardware import POSITIONS

_FULL, _SLIDING = "full_attention", "sliding_attention"

Masks = Float[Tensor, "_rows 1 _queries _keys"] | Mapping[str, Float[Tensor, "_rows 1 _queries _keys"]]
"""What a model takes as `attention_mask`: one additive mask, or one for each kind of layer."""


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """Which columns the layers of a model attend to."""

    kinds: frozenset[str]
    """`full_attention`, `sliding_attention` or both."""
    window: int
    """Columns that a sliding-window layer sees, the query's own included; 0 if the model has no such layer."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> AttentionPattern:
        """The pattern of a causal `transformers` model.

        Raises:
            ConfigError: if the model has layers of another kind (linear, chunked), does not take a prepared mask
                (Bloom, flash attention), attends to later tokens (BERT), or does not count positions from 0 (RoBERTa).
        """
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            slides = window and getattr(config, "use_sliding_window", True) and _knows_windows(config)
            kinds = [_SLIDING if slides else _FULL]
        unknown = set(kinds) - {_FULL, _SLIDING}
        if unknown:
            raise ConfigError(
                f"roundoff samples models whose layers are full or sliding-window attention, but {config.model_type} "
                f"has {', '.join(sorted(unknown))}"
            )
        if not getattr(model, "_supports_attention_backend", False):
            raise ConfigError(
                f"{config.model_type} builds its own masks (its attention does not go through transformers' attention "
                "interface), so roundoff cannot sample from it"
            )
        _check_order(model, config.model_type)
        implementation = getattr(config, "_attn_implementation", None) or ""
        if "flash" in implementation or "flex" in implementation or "paged" in implementation:
            raise ConfigError(
                f"the attention implementation must take a prepared mask, but is {implementation!r}: load the model "
                "with attn_implementation='sdpa'"
            )
        return cls(frozenset(kinds), window if _SLIDING in kinds else 0)

    def windows(self, config: Any) -> tuple[int, ...]:
        """Columns that each layer sees in a model with this config, the query's own included; 0 means all."""
        kinds = getattr(config, "layer_types", None) or [next(iter(self.kinds))] * config.num_hidden_layers
        return tuple(self.window if kind == _SLIDING else 0 for kind in kinds)

    def slides(self, columns: int) -> bool:
        """Whether a sequence of this many columns is longer than the window."""
        return 0 < self.window < columns

    def masks(
        self, queries: Int[Tensor, " queries"], left: Int[Tensor, " rollouts"], columns: int, dtype: torch.dtype
    ) -> Masks:
        """Additive masks [rollouts, 1, queries, columns] for some query columns, given each rollout's left padding."""
        keys = torch.arange(columns, device=left.device)
        seen = (keys <= queries[:, None]) & (keys >= left[:, None, None])  # [rollouts, queries, columns]
        return self._of_each_kind(seen, queries[:, None] - keys, columns, dtype)

    def packed_masks(
        self, segment: Int[Tensor, "rows columns"], position: Int[Tensor, "rows columns"], dtype: torch.dtype
    ) -> Masks:
        """Additive masks [rows, 1, columns, columns] of rows that hold a prompt and several responses to it.

        Args:
            segment: -1 on padding, 0 on the prompt, and a number of its own for each response.
            position: position within the prompt; each response continues from the prompt's end.
            dtype: of the masks.
        """
        columns = segment.shape[1]
        query, key = segment[:, :, None], segment[:, None, :]
        seen = ((key == 0) | ((key > 0) & (key == query))).tril_()  # [rows, columns, columns]
        return self._of_each_kind(seen, position[:, :, None] - position[:, None, :], columns, dtype)

    def _of_each_kind(self, seen: Tensor, distance: Tensor, columns: int, dtype: torch.dtype) -> Masks:
        if not self.slides(columns):
            return _additive(seen, dtype)
        near = _additive(seen & (distance < self.window), dtype)
        return near if self.kinds == {_SLIDING} else {_FULL: _additive(seen, dtype), _SLIDING: near}


def _check_order(model: PreTrainedModel, kind: str) -> None:
    """Refuse models that our masks and positions would run in another way than they were trained."""
    for module in model.modules():
        if getattr(module, "is_causal", True) is False:
            raise ConfigError(
                f"{kind} attends to later tokens as well (an encoder, or use_bidirectional_attention), so it cannot "
                "write one token after the other; if it was trained as a decoder, set is_decoder = true in config.json"
            )
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            raise ConfigError(
                f"{kind} counts its positions from {table.padding_idx + 1} (padding_idx + 1), and roundoff from 0, so "
                "roundoff cannot sample from it"
            )


def _knows_windows(config: Any) -> bool:
    """Whether the class of this config has a window at all; a config.json may set one for a model without (Llama)."""
    kind = type(config)
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else signature(kind.__init__).parameters
    return "sliding_window" in names


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # The lowest finite number rather than -inf: padding attends to nothing, and -inf everywhere would give NaN.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def left_padding(attention_mask: Shaped[Tensor, "rollouts columns"]) -> Int[Tensor, " rollouts"]:
    """Number of padding columns before each rollout's first token."""
    return attention_mask.bool().to(torch.uint8).argmax(dim=1)


def positions(left: Int[Tensor, " rollouts"], columns: int) -> Int[Tensor, "rollouts columns"]:
    """Position of each column, counted without left padding (0 within it)."""
    return (torch.arange(columns, device=left.device) - left[:, None]).clamp(min=0)


def row_ids(
    rollout_ids: Int[Tensor, " rollouts"], position: Int[Tensor, "rollouts columns"]
) -> Int[Tensor, "rollouts columns"]:
    """Row id of each token, which keys the hardware's noise, from its rollout and its position there."""
    return rollout_ids[:, None] * POSITIONS + position
