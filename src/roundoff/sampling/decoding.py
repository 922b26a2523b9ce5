"""The batch that is being decoded: which rows the model computes, and which rollouts read their logits.

Two kinds. `RolloutRows`: one row a rollout; on any model, and wherever passes draw noise. `PrefixRows`: one row for
each distinct text so far; rollouts of one prompt share a row until they write different tokens. It needs the pass that
reads its cache by index (`fused_decoder.py`), and arithmetic that does not draw: then equal texts have equal logits.
Three rollouts of a prompt, with the row of each:

    token        1   2   3
    rollout 0    a   b   end         rows  {0,1,2} -> {0,1}, {2} -> {0}, {1}, {2}
    rollout 1    a   c   end
    rollout 2    d   b   end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.models.draws import noise_context
from roundoff.models.masks import AttentionPattern, Masks, positions, row_ids
from roundoff.numerics.rng import Key
from roundoff.sampling.fused_decoder import FusedDecoder
from roundoff.sampling.kv_cache import KVCache, SharedCache

COMPACT_SHARE = 0.125
"""Rows leave the batch once this share of it has ended: moving rows costs less than computing them."""


class DecodingBatch(Protocol):
    """Rollouts that are decoded together, b of them at a time."""

    def logits(self) -> Tensor:
        """Logits [b, V] of the next token of each rollout."""
        ...

    def leave(self, running: Tensor) -> Tensor:
        """Drop rollouts that are not `running` [b], now or later; the index [b'] of those that stay for now."""
        ...

    def feed(self, tokens: Tensor) -> None:
        """Compute the logits after `tokens` [b]."""
        ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of a batch, left-padded to P columns; those that are alike and adjacent are one of its R rows."""

    tokens: Tensor
    """[R, P]."""
    left: Tensor
    """[R] columns of left padding."""
    counts: Tensor
    """[R] rollouts of each."""

    @classmethod
    def of(cls, encoded: list[list[int]], pad: int, device: torch.device, *, alone: bool) -> Prompts:
        """The prompts of rollouts; `alone`: each a row of its own, as passes that draw noise need."""
        first = [i for i in range(len(encoded)) if alone or i == 0 or encoded[i] != encoded[i - 1]]
        width = max(map(len, encoded))
        rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in first]
        return cls(
            tokens=torch.tensor(rows, device=device),
            left=torch.tensor([width - len(encoded[i]) for i in first], device=device),
            counts=torch.tensor([*first, len(encoded)], device=device).diff(),
        )


@dataclass(frozen=True, slots=True)
class Passes:
    """Forward passes of one call of `sample`."""

    model: PreTrainedModel
    pattern: AttentionPattern
    noise: Key | None
    """Under which passes draw; None on hardware that is not noisy."""
    fused: FusedDecoder | None
    """None: the model's own forward pass."""
    max_new_tokens: int

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def batch(self, prompts: Prompts, ids: Tensor) -> DecodingBatch:
        """A batch after its prompts, for rollouts of these ids [b]."""
        shares = self.fused is not None and self.noise is None and not self.fused.noisy_attention
        return PrefixRows(self, prompts) if shares else RolloutRows(self, prompts, ids)

    def read(self, prompts: Prompts, ids: Tensor, capacity: int) -> tuple[KVCache, Tensor]:
        """A cache of `capacity` columns after the prompts, and their last logits [R, V]; `ids` [R] key the noise."""
        left, width = prompts.left, prompts.tokens.shape[1]
        cache = KVCache(self.layers, capacity)
        if self.fused is not None and self.fused.reads(width):
            with noise_context(self.model, self.noise, row_ids(ids, positions(left, width))):
                return cache, self.fused.logits(prompts.tokens, left, cache, None)
        masks = self.pattern.masks(torch.arange(width, device=left.device), left, width, self.model.dtype)
        return cache, self.own(prompts.tokens, masks, positions(left, width), ids, cache)

    def own(self, tokens: Tensor, masks: Masks, position: Tensor, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [b, V] of the last column by the model's own forward pass."""
        with noise_context(self.model, self.noise, row_ids(ids, position)):
            output = self.model(
                input_ids=tokens,
                attention_mask=masks,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits
        return logits[:, -1].float()


class RolloutRows:
    """One row a rollout."""

    def __init__(self, passes: Passes, prompts: Prompts, ids: Tensor) -> None:
        width = prompts.tokens.shape[1]
        capacity = width + passes.max_new_tokens - 1
        whole = len(prompts.counts) == len(ids)
        self.passes, self.ids, self.column = passes, ids, width
        first = prompts.counts.cumsum(0) - prompts.counts
        self.cache, self._logits = passes.read(prompts, ids[first], capacity if whole else width)
        self.left = prompts.left.repeat_interleave(prompts.counts)
        if not whole:
            self.cache = self.cache.repeated(prompts.counts, capacity)
            self._logits = self._logits.repeat_interleave(prompts.counts, dim=0)
        # [b, 1, 1, P+T] of the last column; those of earlier ones are its leading parts, unless they slide
        self.mask: Tensor | None = None
        if not passes.pattern.slides(capacity + 1):
            mask = self._masks(capacity)
            assert isinstance(mask, Tensor)
            self.mask = mask

    def logits(self) -> Tensor:
        """Logits [b, V] of the next token of each rollout."""
        return self._logits

    def leave(self, running: Tensor) -> Tensor:
        """Drop rollouts once they are enough to pay; the index of those that stay."""
        rows = len(running)
        index = running.nonzero()[:, 0]
        count = len(index)
        if count and rows - count < COMPACT_SHARE * rows:
            return torch.arange(rows, device=running.device)
        # Running rows from beyond `count` move into the places of ended rows before it; the others stay where they are.
        holes, tails = (~running[:count]).nonzero()[:, 0], index[index >= count]
        keep = torch.arange(count, device=index.device)
        keep[holes] = tails
        self.cache.keep(holes, tails, count)
        self.ids, self.left = self.ids[keep], self.left[keep]
        self.mask = None if self.mask is None else self.mask[keep]
        return keep

    def feed(self, tokens: Tensor) -> None:
        """Compute the logits after `tokens` [b]."""
        column, passes = self.column, self.passes
        self.column += 1
        mask = self._masks(column) if self.mask is None else self.mask.narrow(3, 0, column + 1)
        position = (column - self.left)[:, None]
        if passes.fused is None:
            self._logits = passes.own(tokens[:, None], mask, position, self.ids, self.cache)
            return
        with noise_context(passes.model, passes.noise, row_ids(self.ids, position)):
            self._logits = passes.fused.logits(tokens[:, None], self.left, self.cache, mask)

    def _masks(self, column: int) -> Masks:
        queries = torch.tensor([column], device=self.left.device)
        return self.passes.pattern.masks(queries, self.left, column + 1, self.passes.model.dtype)


class PrefixRows:
    """One row for each distinct text so far, n of them for b rollouts."""

    def __init__(self, passes: Passes, prompts: Prompts) -> None:
        assert passes.fused is not None
        self.fused = passes.fused
        read, self._logits = passes.read(prompts, prompts.counts, prompts.tokens.shape[1])
        rows = torch.arange(len(prompts.counts))
        self.row = rows.repeat_interleave(prompts.counts)  # [b] row of each rollout
        self.left = prompts.left  # [n]
        self.cache = SharedCache(read, KVCache(passes.layers, passes.max_new_tokens - 1), len(self.row), rows, rows)

    def logits(self) -> Tensor:
        """Logits [b, V] of the next token of each rollout."""
        each_its_own = torch.equal(self.row, torch.arange(len(self._logits)))
        return self._logits if each_its_own else self._logits[self.row]

    def leave(self, running: Tensor) -> Tensor:
        """Drop ended rollouts at once; the index of those that stay."""
        index = running.nonzero()[:, 0]
        self.row = self.row[index]
        return index

    def feed(self, tokens: Tensor) -> None:
        """Compute the logits after `tokens` [b]: rollouts whose text is still the same stay in one row."""
        parent, token = self.row, tokens
        if len(self.row) > 1:
            base = self._logits.shape[1]
            texts, self.row = torch.unique(self.row * base + tokens, return_inverse=True)
            parent, token = texts // base, texts % base
        else:
            self.row = torch.zeros_like(self.row)
        self.left = self.left[parent]
        self.cache.descend(parent)
        self._logits = self.fused.logits(token[:, None], self.left, self.cache, None)
