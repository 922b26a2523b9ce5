"""A key-value cache that is allocated once, grows by one column per step, and drops rows that have finished.

`transformers.DynamicCache` concatenates, so that each step copies the entire cache. `StaticCache` attends over its full
length from the first step on. This one is allocated at its final length and shows the model a view of the used part.
On hardware with a format of the cache, new columns are quantized as they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.numerics.transfer import put


class KVCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, of which the first `length` columns are in use."""

    keys: Float[Tensor, "rows heads capacity head_size"]
    values: Float[Tensor, "rows heads capacity value_size"]
    is_sliding = False  # the prepared mask applies a sliding window; the storage keeps every column

    def __init__(self, capacity: int, formats: AttentionFormats | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0
        self.formats = formats or AttentionFormats()

    def lazy_initialization(
        self,
        key_states: Float[Tensor, "rows heads new head_size"],
        value_states: Float[Tensor, "rows heads new value_size"] | None = None,
    ) -> None:
        """Allocate the storage; called with the first keys and values, whose shape it takes."""
        values = key_states if value_states is None else value_states
        self.keys = key_states.new_empty((*key_states.shape[:2], self.capacity, key_states.shape[3]))
        self.values = values.new_empty((*values.shape[:2], self.capacity, values.shape[3]))
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "rows heads new head_size"],
        value_states: Float[Tensor, "rows heads new value_size"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "rows heads keys head_size"], Float[Tensor, "rows heads keys value_size"]]:
        """Write the new columns in the format of the cache, and return views of all columns so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        self.length = end = start + new
        self.formats.in_cache(key_states, out=self.keys.narrow(2, start, new))
        self.formats.in_cache(value_states, out=self.values.narrow(2, start, new))
        return self.formats.hand_over(self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end))

    def repeated(self, counts: Int[Tensor, " rows"], capacity: int) -> KVCacheLayer:
        """A layer with row i repeated `counts[i]` times (in host memory), and room for `capacity` columns."""
        layer = KVCacheLayer(capacity, self.formats)
        layer.length, layer.is_initialized = self.length, True
        layer.keys, layer.values = (_repeated(x, self.length, counts, capacity) for x in (self.keys, self.values))
        return layer

    def keep(self, holes: Int[Tensor, " moved"], tails: Int[Tensor, " moved"], rows: int) -> None:
        """Copy rows `tails` into rows `holes`, then keep only the first `rows`; nothing else is copied."""
        for name in ("keys", "values"):
            storage = getattr(self, name)
            if len(holes):
                used = storage.narrow(2, 0, self.length)
                used[holes] = used[tails]
            setattr(self, name, storage.narrow(0, 0, rows))

    def copy_rows(self, source: Int[Tensor, " moved"], target: Int[Tensor, " moved"]) -> None:
        """Copy the columns in use of rows `source` to rows `target`."""
        if self.length:
            for storage in (self.keys, self.values):
                used = storage.narrow(2, 0, self.length)
                used[target] = used[source]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new columns must cover."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Columns that fit into the storage."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in `transformers` 4."""
        return self.capacity


def _repeated(storage: Tensor, length: int, counts: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = storage.shape
    used, times = storage.narrow(2, 0, length), int(counts[0])
    if bool((counts == times).all()):  # groups of equal size are copied in one pass, without an index
        copies = storage.new_empty((rows, times, heads, capacity, size))
        copies.narrow(3, 0, length).copy_(used.unsqueeze(1))
        return copies.flatten(0, 1)
    total = int(counts.sum())
    copies = storage.new_empty((total, heads, capacity, size))
    times_there = put(counts, storage.device)
    copies.narrow(2, 0, length).copy_(used.repeat_interleave(times_there, dim=0, output_size=total))
    return copies


@dataclass(eq=False, slots=True)
class SharedCache:
    """Prompts that several rows of the batch share, and each row's own columns after its prompt, both found by index.

    Columns are copied only where one row becomes several, not where rows begin or end. This needs attention that reads
    its cache by index (`roundoff.sampling.fused_decoder`).
    """

    prompts: KVCache
    """One row for each distinct prompt."""
    own: KVCache
    """Columns after the prompts."""
    capacity: int
    """Number of rows of `own`: the most there can be."""
    prompt_row: Int[Tensor, " rows"]
    """For each row of the batch, its prompt's row in `prompts`."""
    own_row: Int[Tensor, " rows"]
    """For each row of the batch, its row in `own`; no two are equal."""

    def descend(self, parent: Int[Tensor, " rows"]) -> None:
        """Make row i continue row `parent[i]`. Called at every step, with `parent` in ascending order.

        The first child of a parent takes over its columns, the others get copies. Rows without children are gone.
        """
        first = torch.ones_like(parent, dtype=torch.bool)
        torch.ne(parent[1:], parent[:-1], out=first[1:])
        rows = self.own_row[parent]
        others = (~first).nonzero()[:, 0]
        if len(others):
            free = torch.ones(self.capacity, dtype=torch.bool)
            free[rows[first]] = False
            places = free.nonzero()[: len(others), 0]
            for layer in self.own.stack:
                layer.copy_rows(rows[others], places)
            rows[others] = places
        self.own_row, self.prompt_row = rows, self.prompt_row[parent]


class KVCache(Cache):
    """The cache of a model: one `KVCacheLayer` for each decoder layer."""

    stack: list[KVCacheLayer]

    def __init__(self, layers: int, capacity: int, formats: Mapping[int, AttentionFormats] | None = None) -> None:
        """An empty cache.

        Args:
            layers: number of decoder layers.
            capacity: columns that fit into it.
            formats: of the layers whose cache has one, by index (`hardware.attention.cache_formats`).
        """
        formats = formats or {}
        self.stack = [KVCacheLayer(capacity, formats.get(index)) for index in range(layers)]
        super().__init__(layers=list(self.stack))

    def repeated(self, counts: Int[Tensor, " rows"], capacity: int) -> KVCache:
        """A cache with row i repeated `counts[i]` times (in host memory), and room for `capacity` columns."""
        cache = KVCache(0, capacity)
        cache.stack = [layer.repeated(counts, capacity) for layer in self.stack]
        cache.layers = list(cache.stack)
        return cache

    def keep(self, holes: Int[Tensor, " moved"], tails: Int[Tensor, " moved"], rows: int) -> None:
        """In every layer, copy rows `tails` into rows `holes`, then keep only the first `rows`."""
        for layer in self.stack:
            layer.keep(holes, tails, rows)
