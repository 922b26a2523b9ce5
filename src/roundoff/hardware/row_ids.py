"""Row ids: the identity of every token, and of every query and key of attention, by which noise is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

POSITIONS = 1 << 20
"""Row ids reserved for each rollout, and so its longest sequence: `row = rollout_id * POSITIONS + position`."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Row ids and first columns of the products of one attention layer.

    The query heads that share a key head lie one after the other on one axis, `grouped_queries`, of length
    `heads / key_heads * queries`.
    """

    query: Int[Tensor, "rollouts key_heads grouped_queries"]
    """Identity of each pair of query token and head."""
    column_start: Int[Tensor, "rollouts key_heads grouped_queries"]
    """Logical position of the first key, so that left padding does not shift the draws."""
    key: Int[Tensor, "rollouts key_heads keys"]
    """Identity of each pair of key token and key head."""


def attention_rows(rows: Tensor, heads: int, key_heads: int, keys: int, column: Tensor | None) -> AttentionRows:
    """Row ids of attention. The key at `column` belongs to the last query's token.

    Without a column it is the last key, as in a growing or sliding cache.
    """
    batch, queries = rows.shape
    columns = torch.arange(keys - queries, keys, device=rows.device)
    if column is not None:
        columns = columns + (column + 1 - keys)
    start = rows % POSITIONS - columns  # [rollouts, queries]: logical position of the first key
    if keys == queries:
        key_rows = rows
    else:  # counted back from the last query, which left padding never replaces
        rollout = rows[:, -1:] - rows[:, -1:] % POSITIONS
        key_rows = rollout + start[:, -1:] + torch.arange(keys, device=rows.device)
    head_ids = torch.arange(heads, device=rows.device)[:, None]
    shape = (batch, key_heads, heads // key_heads * queries)
    return AttentionRows(
        query=(rows[:, None] * heads + head_ids).reshape(shape),
        column_start=start[:, None].expand(batch, heads, queries).reshape(shape),
        key=key_rows[:, None] * key_heads + torch.arange(key_heads, device=rows.device)[:, None],
    )
