"""Row ids for verl's batches, which carry no rollout ids: a rollout is known by its tokens.

`row = id * 2**20 + position`, as in `roundoff.models.masks.row_ids`, where id is 43 bits of a hash of the whole
sequence. The passes over one rollout (old, reference and new log-probabilities) then draw the same noise under the same
key, on whichever rank, and in whichever micro-batch and order verl puts it. Equal sequences share their draws within a
step.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from roundoff.hardware import POSITIONS

_IDS = 1 << 43


def sequence_id(tokens: Tensor) -> int:
    """A number in [0, 2**43) that depends on the tokens [T] of a sequence and nothing else."""
    data = tokens.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") % _IDS


def padded_rows(sequences: list[Tensor]) -> Tensor:
    """Row ids [B, T] int64 of sequences that are padded on the right to the longest one."""
    ids = torch.tensor([sequence_id(tokens) for tokens in sequences])
    width = max(len(tokens) for tokens in sequences)
    return ids[:, None] * POSITIONS + torch.arange(width)


def packed_rows(sequences: list[Tensor]) -> Tensor:
    """Row ids [1, N] int64 of sequences laid one after the other, N being the sum of their lengths."""
    parts = [sequence_id(tokens) * POSITIONS + torch.arange(len(tokens)) for tokens in sequences]
    return torch.cat(parts)[None]
