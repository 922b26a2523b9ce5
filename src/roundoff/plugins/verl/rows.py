"""Row ids for verl's batches, which carry no rollout ids, so that a rollout is identified by its tokens.

`row = id * 2**20 + position`, as in `roundoff.models.masks.row_ids`, where `id` is 43 bits of a hash of the whole
sequence. The passes over one rollout (old, reference and new log-probabilities) therefore draw the same noise under the
same key, whatever the rank, micro-batch and order in which verl computes them. Equal sequences share their draws within
a step.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from roundoff.hardware import POSITIONS

_IDS = 1 << 43


def sequence_id(tokens: Int[Tensor, " columns"]) -> int:
    """A number in [0, 2**43) that depends on the tokens of a sequence alone."""
    data = tokens.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") % _IDS


def padded_rows(sequences: list[Int[Tensor, " _"]]) -> Int[Tensor, "rollouts columns"]:
    """Row ids (int64) of sequences that are padded on the right to the longest one."""
    ids = torch.tensor([sequence_id(tokens) for tokens in sequences])
    width = max(len(tokens) for tokens in sequences)
    return ids[:, None] * POSITIONS + torch.arange(width)


def real_tokens(sequences: list[Int[Tensor, " _"]]) -> Bool[Tensor, "rollouts columns"]:
    """Which tokens are no padding, where sequences are padded on the right to the longest one."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def packed_rows(sequences: list[Int[Tensor, " _"]]) -> Int[Tensor, "1 columns"]:
    """Row ids (int64) of sequences that follow one another in one row, as long as all of them together."""
    parts = [sequence_id(tokens) * POSITIONS + torch.arange(len(tokens)) for tokens in sequences]
    return torch.cat(parts)[None]
