"""How the tokens of a training pass are laid out: one rollout per row, or the rollouts of one prompt in a shared row.

All rollouts of a group have the same prompt. A packed row holds it once, so it is computed once. Each response token
attends only to the prompt and to its own response, at the positions it had when it was sampled. The last token of a
response predicts nothing and is not an input; responses with equal inputs appear once. Take four rollouts of "3-1="
that wrote a: "2", end; b: "12", end; c: "13", end; d: "2", end:

    column     0    1    2    3    4    5    6    7    8    9
    token    pad    3    -    1    =    2    1    2    1    3
    response                            ad   b    b    c    c
    position   0    0    1    2    3    4    4    5    4    5

The result equals that of the plain layout up to float32 rounding: the same sums in another order. Packing is only for
arithmetic without random draws and without formats of gradients: on noisy hardware every rollout has its own pass over
its prompt, as in sampling, and a gradient that is summed over the rollouts before it is quantized is another number.

A layout is planned in host memory, where the tokens are; only what the model reads is copied to its device.

The number of responses in a row minimizes an estimated cost, in which a column costs as much as `COLUMN * hidden`
query-key pairs. Long responses to short prompts keep the plain layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from roundoff.models.masks import AttentionPattern, Masks, left_padding, positions
from roundoff.numerics.transfer import put

COLUMN = 6
"""Cost of a column in query-key pairs, per unit of hidden size h. A decoder layer has about 12*h*h weights, and
attention takes 2*h multiplications per pair, so a column costs 6*h pairs."""
MOST_PAIRS = 2.0
"""Largest allowed ratio of packed to plain query-key pairs; it bounds the memory of the masks."""
SPLITS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Divisors of the longest group's length that are tried as the length of a row."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Inputs of one pass, and where to find the logits of each of its `targets` (the response tokens).

    The inputs are on the model's device, the targets in host memory.
    """

    tokens: Int[Tensor, "rows columns"]
    """Token ids, int64; on the device."""
    position: Int[Tensor, "rows columns"]
    """Position of each token, int64; on the device."""
    masks: Masks
    """Attention masks; on the device."""
    kept: int
    """Number of columns at the end of each row whose logits are needed."""
    rollout: Int[Tensor, " targets"]
    """Index of the target's rollout."""
    index: Int[Tensor, " targets"]
    """Index of the target within its response."""
    source: Int[Tensor, " targets"]
    """Index, among the `rows * kept` rows of logits, of those that predict the target."""
    rows: Int[Tensor, "rows columns"] | None
    """Row ids for the hardware's draws, in host memory; None in a packed layout."""
    real: Bool[Tensor, "rows columns"] | None
    """Which tokens are no padding, in host memory, for hardware that quantizes gradients; None in a packed layout."""


def plain(
    tokens: Int[Tensor, "rollouts columns"],
    mask: Bool[Tensor, "rollouts columns"],
    response_length: int,
    rows: Int[Tensor, "rollouts columns"] | None,
    pattern: AttentionPattern,
    dtype: torch.dtype,
    device: torch.device,
) -> Layout:
    """The layout with one rollout per row, without the columns that are padding in every rollout.

    The arguments are in host memory; `device` is the model's.
    """
    first, last = _used_columns(mask, response_length)
    columns = slice(first, last)  # of the input: the last token predicts nothing
    left = left_padding(mask[:, columns])
    width = last - first
    start = tokens.shape[1] - response_length
    kept = last - start + 1
    rollout, index = mask[:, start : last + 1].nonzero(as_tuple=True)
    return Layout(
        tokens=put(tokens[:, columns], device),
        position=put(positions(left, width), device),
        masks=pattern.masks(torch.arange(width, device=device), put(left, device), width, dtype),
        kept=kept,
        rollout=rollout,
        index=index,
        source=rollout * kept + index,
        rows=None if rows is None else rows[:, columns],
        real=mask[:, columns],
    )


def packed(
    tokens: Int[Tensor, "rollouts columns"],
    mask: Bool[Tensor, "rollouts columns"],
    response_length: int,
    pattern: AttentionPattern,
    dtype: torch.dtype,
    hidden: int,
    device: torch.device,
) -> Layout | None:
    """The layout with adjacent rollouts of one prompt in one row or a few.

    `hidden` is the model's hidden size and `device` its device; the tensors are in host memory. Returns None where
    packing does not pay, or where a response has gaps.
    """
    start = tokens.shape[1] - response_length
    first, last = _used_columns(mask, response_length)
    prompts, inside = tokens[:, first:start].masked_fill(~mask[:, first:start], -1), mask[:, start:]
    lengths = inside.sum(dim=1)
    if not bool((inside == (torch.arange(response_length) < lengths[:, None])).all()):
        return None
    inputs = (lengths - 1).clamp(min=0)
    written = [tuple(text[:n]) for text, n in zip(tokens[:, start:].tolist(), inputs.tolist(), strict=True)]
    texts = DistinctTexts.of(written, [True, *(prompts[1:] != prompts[:-1]).any(dim=1).tolist()])
    rows = plan_rows(texts, start - first, last - first, hidden)
    if rows is None:
        return None
    number, writer, row, offset = map(torch.tensor, (texts.number, texts.writer, rows.row, rows.offset))
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
        tokens=put(packed_tokens, device),
        position=(on_device := put(position, device)),
        masks=pattern.packed_masks(put(segment, device), on_device, dtype),
        kept=extra + 1,
        rollout=rollout,
        index=index,
        source=row[rollout] * (extra + 1) + torch.where(index > 0, offset[rollout] + index, 0),
        rows=None,
        real=None,
    )


@dataclass(frozen=True, slots=True)
class DistinctTexts:
    """The distinct responses to each prompt, in order of appearance."""

    number: list[int]
    """For each rollout, the index of the text that it wrote."""
    writer: list[int]
    """For each text, the first rollout that wrote it."""
    length: list[int]
    """For each text, its number of input tokens."""
    opens: list[bool]
    """For each text, whether it is the first one for its prompt."""

    @classmethod
    def of(cls, written: list[tuple[int, ...]], is_new: list[bool]) -> DistinctTexts:
        """The distinct texts among those `written` by the rollouts; `is_new` marks where the prompt changes."""
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
class RowPlan:
    """How the texts are distributed over rows."""

    row: list[int]
    """For each text, its row."""
    offset: list[int]
    """For each text, the column where it begins, counted from the prompt's end."""
    extra: int
    """Columns after the prompt."""


def plan_rows(texts: DistinctTexts, prompt: int, plain_columns: int, hidden: int) -> RowPlan | None:
    """The cheapest distribution of the texts over rows; None if the plain layout is cheaper still.

    Args:
        texts: the distinct responses.
        prompt: columns of the longest prompt.
        plain_columns: columns of the plain layout.
        hidden: the model's hidden size.
    """

    def cost(rows: int, columns: int) -> int:
        return rows * columns * (COLUMN * hidden + columns)

    rollouts, longest = len(texts.number), max(texts.length)
    unsplit = fill_rows(texts, sum(texts.length))
    best, least = None, cost(rollouts, plain_columns)
    for limit in dict.fromkeys(max(longest, round(unsplit.extra / split)) for split in SPLITS):
        rows = fill_rows(texts, limit)
        count, columns = rows.row[-1] + 1, prompt + rows.extra
        row_cost = cost(count, columns)
        if row_cost < least and count * columns**2 <= MOST_PAIRS * rollouts * plain_columns**2:
            best, least = rows, row_cost
    return best


def fill_rows(texts: DistinctTexts, limit: int) -> RowPlan:
    """Rows filled in order; a new row begins with each prompt, and where a text would exceed `limit` columns."""
    row, offset = [], []
    current, used, extra = -1, 0, 0
    for length, opens in zip(texts.length, texts.opens, strict=True):
        if opens or used + length > limit:
            current, used = current + 1, 0
        row.append(current)
        offset.append(used)
        used += length
        extra = max(extra, used)
    return RowPlan(row, offset, extra)


def _used_columns(mask: Tensor, response_length: int) -> tuple[int, int]:
    """First and last column that hold a token, the last being at least the first response column."""
    used = mask.any(dim=0).nonzero()
    start = mask.shape[1] - response_length
    if not len(used):
        return start - 1, start
    return min(int(used[0]), start - 1), max(int(used[-1]), start)
