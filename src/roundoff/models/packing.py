"""How the tokens of a training pass are laid out: one rollout a row, or the rollouts of one prompt behind one another.

The G rollouts of a prompt share it. In a packed row it stands once and is computed once; a response token attends to
the prompt and to its own response alone, at the positions it had when it was sampled. The last token of a response
predicts nothing and is no input; responses of equal inputs stand once. Four rollouts of "3-1=" that wrote a: "2", end;
b: "12", end; c: "13", end; d: "2", end:

    column     0    1    2    3    4    5    6    7    8    9
    token    pad    3    -    1    =    2    1    2    1    3
    response                            ad   b    b    c    c
    position   0    0    1    2    3    4    4    5    4    5

The result is that of the plain layout up to float32 rounding: the same sums in another order. Packing is only for
arithmetic that does not draw: on noisy hardware every rollout makes its own pass over its prompt, as in sampling.

How many responses share a row is chosen by cost: a column costs as much as `COLUMN` query-key pairs for each number of
the hidden size. Long responses to short prompts stay plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundoff.models.masks import AttentionPattern, Masks, left_padding, positions

COLUMN = 6
"""A decoder layer of hidden size h has about 12*h*h weights, and attention 2*h multiplications a pair: 6*h pairs."""
MOST_PAIRS = 2.0
"""Packed query-key pairs over plain ones at most: masks take their memory."""
SPLITS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Parts of the longest group that are tried as the length of a row."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Inputs of one pass, and where each response token's logits are found; R rows, L columns, K response tokens."""

    tokens: Tensor
    """[R, L] int64."""
    position: Tensor
    """[R, L] int64."""
    masks: Masks
    kept: int
    """Columns at the end whose logits are needed."""
    rollout: Tensor
    """[K]: row of each response token in the N given."""
    index: Tensor
    """[K]: its column among the T given."""
    source: Tensor
    """[K]: place among the R * kept logits of those that predict it."""
    rows: Tensor | None
    """[R, L]: row ids for the hardware's draws (plain layout alone)."""


def plain(
    tokens: Tensor,
    mask: Tensor,
    response_length: int,
    rows: Tensor | None,
    pattern: AttentionPattern,
    dtype: torch.dtype,
) -> Layout:
    """One rollout a row: tokens and mask [N, P+T] without the columns that are padding in all."""
    first, last = _used_columns(mask, response_length)
    columns = slice(first, last)  # of the input: the last token predicts nothing
    left = left_padding(mask[:, columns])
    width = last - first
    start = tokens.shape[1] - response_length
    kept = last - start + 1
    rollout, index = mask[:, start : last + 1].nonzero(as_tuple=True)
    return Layout(
        tokens=tokens[:, columns],
        position=positions(left, width),
        masks=pattern.masks(torch.arange(width, device=tokens.device), left, width, dtype),
        kept=kept,
        rollout=rollout,
        index=index,
        source=rollout * kept + index,
        rows=None if rows is None else rows[:, columns],
    )


def packed(
    tokens: Tensor,
    mask: Tensor,
    response_length: int,
    pattern: AttentionPattern,
    dtype: torch.dtype,
    hidden: int,
) -> Layout | None:
    """Adjacent rollouts of one prompt in one row or a few; None where that does not pay, or a response has gaps.

    `hidden` is the model's hidden size.
    """
    start = tokens.shape[1] - response_length
    first, last = _used_columns(mask, response_length)
    prompts, inside = tokens[:, first:start].masked_fill(~mask[:, first:start], -1), mask[:, start:]
    lengths = inside.sum(dim=1)
    if not bool((inside == (torch.arange(response_length, device=tokens.device) < lengths[:, None])).all()):
        return None
    inputs = (lengths - 1).clamp(min=0)
    written = [tuple(text[:n]) for text, n in zip(tokens[:, start:].tolist(), inputs.tolist(), strict=True)]
    texts = _Texts.of(written, [True, *(prompts[1:] != prompts[:-1]).any(dim=1).tolist()])
    rows = _rows(texts, start - first, last - first, hidden)
    if rows is None:
        return None
    number, writer, row, offset = (
        torch.tensor(x, device=tokens.device) for x in (texts.number, texts.writer, rows.row, rows.offset)
    )
    opener = writer[torch.cat([row.new_ones(1), row.diff()]).bool()]
    is_writer = torch.zeros_like(number, dtype=torch.bool).index_fill_(0, writer, True)
    row, offset = row[number], offset[number]
    width, count, extra = start - first, len(opener), rows.extra

    left = left_padding(mask[opener, first:])
    packed_tokens = tokens.new_zeros(count, width + extra)
    segment = torch.full_like(packed_tokens, -1)  # -1 padding, 0 prompt, then the number of the rollout from 1
    position = torch.zeros_like(segment)
    packed_tokens[:, :width] = tokens[opener, first:start]
    position[:, :width] = positions(left, width)
    segment[:, :width].masked_fill_(mask[opener, first:start], 0)
    rollout, index = inside.nonzero(as_tuple=True)
    fed = (index < inputs[rollout]) & is_writer[rollout]
    n, t = rollout[fed], index[fed]
    place = row[n], width + offset[n] + t
    packed_tokens[place] = tokens[n, start + t]
    segment[place] = n + 1
    position[place] = (width - left)[row[n]] + t
    return Layout(
        tokens=packed_tokens,
        position=position,
        masks=pattern.packed_masks(segment, position, dtype),
        kept=extra + 1,
        rollout=rollout,
        index=index,
        source=row[rollout] * (extra + 1) + torch.where(index > 0, offset[rollout] + index, 0),
        rows=None,
    )


@dataclass(frozen=True, slots=True)
class _Texts:
    """The distinct responses to each prompt, one after the other."""

    number: list[int]
    """Which of them each rollout wrote."""
    writer: list[int]
    """The first rollout that wrote it."""
    length: list[int]
    opens: list[bool]
    """Whether it is the first to its prompt."""

    @classmethod
    def of(cls, written: list[tuple[int, ...]], is_new: list[bool]) -> _Texts:
        """`written` by the rollouts, whose prompt `is_new` where it differs from the one before."""
        texts = cls([], [], [], [])
        known: dict[tuple[int, ...], int] = {}
        for rollout, (response, new) in enumerate(zip(written, is_new, strict=True)):
            if new:
                known = {}
            if response not in known:
                known[response] = len(texts.length)
                texts.writer.append(rollout)
                texts.length.append(len(response))
                texts.opens.append(new)
            texts.number.append(known[response])
        return texts


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which row each text is in, where it begins there, and the columns after the prompt."""

    row: list[int]
    offset: list[int]
    extra: int


def _rows(texts: _Texts, prompt: int, plain_columns: int, hidden: int) -> _Rows | None:
    """The cheapest distribution of the texts over rows; None if the plain layout is cheaper."""

    def cost(rows: int, columns: int) -> int:
        return rows * columns * (COLUMN * hidden + columns)

    rollouts, longest = len(texts.number), max(texts.length)
    whole = _filled(texts, sum(texts.length))
    best, least = None, cost(rollouts, plain_columns)
    for limit in dict.fromkeys(max(longest, round(whole.extra / split)) for split in SPLITS):
        rows = _filled(texts, limit)
        count, columns = rows.row[-1] + 1, prompt + rows.extra
        found = cost(count, columns)
        if found < least and count * columns**2 <= MOST_PAIRS * rollouts * plain_columns**2:
            best, least = rows, found
    return best


def _filled(texts: _Texts, limit: int) -> _Rows:
    """Texts one after the other; a row begins with each prompt, and where `limit` columns would be passed."""
    row, offset = [], []
    current, used, extra = -1, 0, 0
    for length, opens in zip(texts.length, texts.opens, strict=True):
        if opens or used + length > limit:
            current, used = current + 1, 0
        row.append(current)
        offset.append(used)
        used += length
        extra = max(extra, used)
    return _Rows(row, offset, extra)


def _used_columns(mask: Tensor, response_length: int) -> tuple[int, int]:
    """First column that holds a token, and the last one (at least the first response column)."""
    used = mask.any(dim=0).nonzero()
    start = mask.shape[1] - response_length
    if not len(used):
        return start - 1, start
    return min(int(used[0]), start - 1), max(int(used[-1]), start)
