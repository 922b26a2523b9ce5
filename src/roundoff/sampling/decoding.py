"""The batch that is being decoded: which rows the model computes, and which rollouts read their logits.

There are two kinds. `RolloutRows` has one row per rollout; it works on any model, and is used wherever passes draw
noise. `PrefixRows` has one row for each distinct text so far, so that rollouts of one prompt share a row until they
write different tokens. It needs the pass that reads its cache by index (`roundoff.sampling.fused_decoder`), and
arithmetic that does not draw, under which equal texts have equal logits. Three rollouts of a prompt, with their rows
after each token:

    token        1   2   3
    rollout 0    a   b   end         rows  {0,1,2} -> {0,1}, {2} -> {0}, {1}, {2}
    rollout 1    a   c   end
    rollout 2    d   b   end
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.hardware import attention
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.models.draws import noise_context
from roundoff.models.masks import AttentionPattern, Masks, positions, row_ids
from roundoff.numerics.rng import Key
from roundoff.numerics.transfer import put
from roundoff.sampling.fused_decoder import FusedDecoder
from roundoff.sampling.kv_cache import KVCache, SharedCache

COMPACT_SHARE = 0.125
"""Ended rows are removed once they make up this share of the batch: moving rows costs less than computing them."""


class DecodingBatch(Protocol):
    """Rollouts that are decoded together."""

    def logits(self) -> Float[Tensor, "rollouts vocabulary"]:
        """Logits of the next token of each rollout."""
        ...

    def leave(self, running: Bool[Tensor, " rollouts"]) -> Int[Tensor, " remaining"]:
        """Drop rollouts that are not `running`, now or later; returns the index of those that stay for now.

        `running` is in host memory, and the index where the rollouts are.
        """
        ...

    def feed(self, tokens: Int[Tensor, " rollouts"]) -> None:
        """Compute the logits that follow `tokens`."""
        ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a batch, left-padded to one width; adjacent rollouts of equal prompts share a row."""

    tokens: Int[Tensor, "rows columns"]
    """Token ids."""
    left: Int[Tensor, " rows"]
    """Columns of left padding in each row."""
    counts: Int[Tensor, " rows"]
    """Number of rollouts of each row; in host memory."""

    @classmethod
    def of(cls, encoded: list[list[int]], pad: int, device: torch.device, *, alone: bool) -> Prompts:
        """The prompts of rollouts. With `alone`, each rollout has a row of its own, as passes that draw noise need."""
        first = [i for i in range(len(encoded)) if alone or i == 0 or encoded[i] != encoded[i - 1]]
        width = max(map(len, encoded))
        rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in first]
        return cls(
            tokens=put(rows, device),
            left=put([width - len(encoded[i]) for i in first], device),
            counts=torch.tensor([*first, len(encoded)]).diff(),
        )


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward passes of one call of `sample`."""

    model: PreTrainedModel
    pattern: AttentionPattern
    noise: Key | None
    """Key under which passes draw; None on hardware that is not noisy."""
    fused: FusedDecoder | None
    """The fused pass; None where the model's own forward pass is used."""
    max_new_tokens: int
    """Length limit of a response."""
    cached: Mapping[int, AttentionFormats] = field(init=False)
    """The formats of the layers whose cache has one, by index, looked up once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cached", attention.cache_formats(self.model))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def batch(self, prompts: Prompts, ids: Int[Tensor, " rollouts"]) -> DecodingBatch:
        """A batch that has read its prompts, for rollouts with these ids."""
        shares = self.fused is not None and self.noise is None and not self.fused.noisy_attention
        return PrefixRows(self, prompts) if shares else RolloutRows(self, prompts, ids)

    def read(
        self, prompts: Prompts, ids: Int[Tensor, " rows"], capacity: int
    ) -> tuple[KVCache, Float[Tensor, "rows vocabulary"]]:
        """Read the prompts. Returns a cache with `capacity` columns and the logits that follow each prompt.

        `ids` are the rollout ids that key the noise, one for each row.
        """
        left, width = prompts.left, prompts.tokens.shape[1]
        cache = KVCache(self.layers, capacity, self.cached)
        if self.fused is not None and self.fused.reads(width):
            with noise_context(self.model, self.noise, row_ids(ids, positions(left, width))):
                return cache, self.fused.logits(prompts.tokens, left, cache, None)
        masks = self.pattern.masks(torch.arange(width, device=left.device), left, width, self.model.dtype)
        return cache, self.own(prompts.tokens, masks, positions(left, width), ids, cache)

    def own(
        self,
        tokens: Int[Tensor, "rows columns"],
        masks: Masks,
        position: Int[Tensor, "rows columns"],
        ids: Int[Tensor, " rows"],
        cache: KVCache,
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits of the last column, by the model's own forward pass."""
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
    """A batch with one row per rollout."""

    def __init__(self, passes: Passes, prompts: Prompts, ids: Int[Tensor, " rollouts"]) -> None:
        width = prompts.tokens.shape[1]
        capacity = width + passes.max_new_tokens - 1
        one_each = len(prompts.counts) == len(ids)
        self.passes, self.ids, self.column = passes, ids, width
        first = prompts.counts.cumsum(0) - prompts.counts
        reading = ids if one_each else ids[put(first, ids.device)]
        self.cache, self._logits = passes.read(prompts, reading, capacity if one_each else width)
        self.left = prompts.left
        if not one_each:
            row = put(torch.arange(len(prompts.counts)).repeat_interleave(prompts.counts), ids.device)
            self.left = prompts.left[row]
            self.cache = self.cache.repeated(prompts.counts, capacity)
            self._logits = self._logits[row]
        # Mask [rollouts, 1, 1, capacity + 1] of the last column; without a sliding window, a part of it serves
        # every earlier column
        self.mask: Tensor | None = None
        if not passes.pattern.slides(capacity + 1):
            mask = self._masks(capacity)
            assert isinstance(mask, Tensor)
            self.mask = mask

    def logits(self) -> Float[Tensor, "rollouts vocabulary"]:
        """Logits of the next token of each rollout."""
        return self._logits

    def leave(self, running: Bool[Tensor, " rollouts"]) -> Int[Tensor, " remaining"]:
        """Drop ended rollouts once there are enough of them to pay; returns the index of those that stay."""
        rows, device = len(running), self.left.device
        index = running.nonzero()[:, 0]
        count = len(index)
        if count and rows - count < COMPACT_SHARE * rows:
            return torch.arange(rows, device=device)
        # Running rows from `count` on move into the places of ended rows before it; the others stay where they are.
        holes, tails = (~running[:count]).nonzero()[:, 0], index[index >= count]
        keep = torch.arange(count)
        keep[holes] = tails
        holes, tails, keep = (put(part, device) for part in (holes, tails, keep))
        self.cache.keep(holes, tails, count)
        self.ids, self.left = self.ids[keep], self.left[keep]
        self.mask = None if self.mask is None else self.mask[keep]
        return keep

    def feed(self, tokens: Int[Tensor, " rollouts"]) -> None:
        """Compute the logits that follow `tokens`."""
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
        queries = torch.full((1,), column, device=self.left.device)
        return self.passes.pattern.masks(queries, self.left, column + 1, self.passes.model.dtype)


class PrefixRows:
    """A batch with one row for each distinct text so far."""

    def __init__(self, passes: Passes, prompts: Prompts) -> None:
        assert passes.fused is not None
        self.fused = passes.fused
        prompt_cache, self._logits = passes.read(prompts, prompts.counts, prompts.tokens.shape[1])
        rows = torch.arange(len(prompts.counts))
        self.row = rows.repeat_interleave(prompts.counts)  # row of each rollout
        self.left = prompts.left  # left padding of each row
        own_cache = KVCache(passes.layers, passes.max_new_tokens - 1)
        self.cache = SharedCache(prompt_cache, own_cache, len(self.row), rows, rows)

    def logits(self) -> Float[Tensor, "rollouts vocabulary"]:
        """Logits of the next token of each rollout."""
        each_its_own = torch.equal(self.row, torch.arange(len(self._logits)))
        return self._logits if each_its_own else self._logits[self.row]

    def leave(self, running: Bool[Tensor, " rollouts"]) -> Int[Tensor, " remaining"]:
        """Drop ended rollouts at once; returns the index of those that stay."""
        index = running.nonzero()[:, 0]
        self.row = self.row[index]
        return index

    def feed(self, tokens: Int[Tensor, " rollouts"]) -> None:
        """Compute the logits that follow `tokens`; rollouts whose text is still the same stay in one row."""
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
