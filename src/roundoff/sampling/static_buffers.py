"""The state of a batch that is being decoded, in memory that never moves, and the step that takes it one token further.

A CUDA graph replays kernels with the addresses and the numbers that they had when it was captured. So the step here
reads everything that changes from token to token out of tensors: the column and the index of the token, who is still
running, and through them positions, masks and row ids. It is a plain function that computes the same thing eagerly on
any device. Keys of draws are numbers, and stay what they are throughout a rollout.

The batch has more rows than rollouts where their number is not a power of two. Such rows compute something, and what
they write lands in a row of the results that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.models.draws import noise_context
from roundoff.models.masks import row_ids
from roundoff.numerics.transfer import put
from roundoff.sampling.choice import SamplingSettings, choose
from roundoff.sampling.decoding import Passes
from roundoff.sampling.kv_cache import KVCache

COLUMNS_STEP = 256
"""A step attends to this many columns, or twice as many, and so on: fewer captured graphs, and more masked columns."""


def bucket(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


def rounded_columns(count: int) -> int:
    """The smallest multiple of `COLUMNS_STEP` that is at least `count`."""
    return -(-count // COLUMNS_STEP) * COLUMNS_STEP


STEPPED = ("column", "time", "token", "running")
"""Buffers that a step changes in every row."""
RESULTS = ("length", "truncated", "nonfinite")
"""Results that a step changes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a batch at one token."""

    values: dict[str, Tensor]
    """Copies of what a step changes, by name."""
    logprob: Float[Tensor, " rows"]
    """Log-probability of the last token of each row."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """The state of a batch, or a part of its rows and columns that shares its memory."""

    keys: tuple[Float[Tensor, "rows _heads columns _size"], ...]
    """Keys of each layer. What lies beyond the columns in use is finite, because masked columns are multiplied by 0."""
    values: tuple[Float[Tensor, "rows _heads columns _value_size"], ...]
    """Values of each layer."""
    column: Int[Tensor, " 1"]
    """Column of the last token, which the next step feeds."""
    time: Int[Tensor, " 1"]
    """Index of the last token within its response."""
    token: Int[Tensor, " rows"]
    """Id of the last token."""
    left: Int[Tensor, " rows"]
    """Columns of left padding."""
    ids: Int[Tensor, " rows"]
    """Rollout ids, which key the noise."""
    slot: Int[Tensor, " rows"]
    """Row of the results that each row writes."""
    running: Bool[Tensor, " rows"]
    """Whether the rollout has not ended."""
    uniforms: Float[Tensor, "rows tokens"]
    """Numbers that choose the tokens."""
    tokens: Int[Tensor, "results tokens"]
    """Tokens of each response; those after its end are arbitrary."""
    logprobs: Float[Tensor, "results tokens"]
    """Their log-probabilities."""
    length: Int[Tensor, " results"]
    """Tokens of each response."""
    truncated: Bool[Tensor, " results"]
    """Whether each response has no end token."""
    nonfinite: Bool[Tensor, " results"]
    """Whether each response ended because the logits were not finite."""

    @classmethod
    def allocate(cls, rows: int, columns: int, tokens: int, like: KVCache, device: torch.device) -> Buffers:
        """Buffers for a model whose cache holds keys and values as `like` does."""

        def stored(one: Tensor) -> Tensor:
            return one.new_zeros(rows, one.shape[1], columns, one.shape[3])

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        single = torch.float32
        return cls(
            keys=tuple(stored(layer.keys) for layer in like.stack),
            values=tuple(stored(layer.values) for layer in like.stack),
            column=numbers(1),
            time=numbers(1),
            token=numbers(rows),
            left=numbers(rows),
            ids=numbers(rows),
            slot=numbers(rows),
            running=numbers(rows, dtype=torch.bool),
            uniforms=numbers(rows, tokens, dtype=single),
            tokens=numbers(rows + 1, tokens),
            logprobs=numbers(rows + 1, tokens, dtype=single),
            length=numbers(rows + 1),
            truncated=numbers(rows + 1, dtype=torch.bool),
            nonfinite=numbers(rows + 1, dtype=torch.bool),
        )

    def holds(self, rows: int, columns: int, tokens: int, like: KVCache) -> bool:
        """Whether a batch of this size fits, for a model whose cache is like this one."""
        own, other = self.keys[0], like.stack[0].keys
        same = len(self.keys) == len(like.stack) and own.dtype is other.dtype and own.device == other.device
        same = same and (own.shape[1], own.shape[3]) == (other.shape[1], other.shape[3])
        return same and rows <= own.shape[0] and columns <= own.shape[2] and tokens <= self.uniforms.shape[1]

    def part(self, rows: int, columns: int) -> Buffers:
        """The first rows and columns, in the same memory; results stay whole."""
        of_rows = ("token", "left", "ids", "slot", "running", "uniforms")
        changes: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changes |= {name: getattr(self, name).narrow(0, 0, rows) for name in of_rows}
        for name in ("keys", "values"):
            changes[name] = tuple(x.narrow(0, 0, rows).narrow(2, 0, columns) for x in getattr(self, name))
        return Buffers(**changes)

    def load(
        self,
        cache: KVCache,
        row: Int[Tensor, " rollouts"],
        left: Int[Tensor, " rollouts"],
        ids: Int[Tensor, " rollouts"],
        uniforms: Float[Tensor, "rollouts tokens"] | None,
        limit: int,
    ) -> None:
        """Begin a batch that has read its prompts. The buffers have its number of rows, a power of two.

        Args:
            cache: keys and values of the prompts.
            row: the prompt of each rollout, in host memory.
            left: left padding of each rollout.
            ids: id of each rollout.
            uniforms: numbers that choose the tokens; None if decoding is greedy.
            limit: most tokens of a response.
        """
        rows, count, width = len(self.token), len(row), cache.stack[0].length
        source = put(torch.cat([row, row.new_zeros(rows - count)]), self.token.device)
        for storage, name in ((self.keys, "keys"), (self.values, "values")):
            for own, layer in zip(storage, cache.stack, strict=True):
                own.zero_()
                own.narrow(2, 0, width).copy_(getattr(layer, name).narrow(2, 0, width)[source])
        self.column.fill_(width - 1)
        self.time.fill_(-1)
        for buffer, given in ((self.left, left), (self.ids, ids)):
            buffer.zero_()
            buffer[:count] = given
        self.slot.fill_(len(self.length) - 1)
        self.slot[:count] = torch.arange(count, device=self.slot.device)
        self.running.zero_()
        self.running[:count] = True
        if uniforms is not None:
            self.uniforms.zero_()
            self.uniforms[:count, : uniforms.shape[1]] = uniforms
        self.length.fill_(limit)
        self.truncated.fill_(True)
        self.nonfinite.zero_()

    def snapshot(self) -> Snapshot:
        """What a step changes, but for the cache, which it writes again in the same way."""
        time = self.time.clamp(min=0)
        return Snapshot(
            {name: getattr(self, name).clone() for name in (*STEPPED, *RESULTS)},
            self.logprobs.index_select(1, time)[:, 0][self.slot],
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Undo what was done since a snapshot, but for the cache and for what the results hold behind `time`."""
        for name, value in snapshot.values.items():
            getattr(self, name).copy_(value)

    def move(self, keep: Int[Tensor, " kept"], holes: Int[Tensor, " moved"], tails: Int[Tensor, " moved"]) -> None:
        """Give the first rows the state of the rows `keep`, of which only `tails` move, into `holes`."""
        for buffer in (self.token, self.left, self.ids, self.slot, self.running, self.uniforms):
            buffer[: len(keep)] = buffer[keep]
        for storage in (*self.keys, *self.values):
            storage[holes] = storage[tails]


class StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, of which a step writes one column and attends to all, masked ones included."""

    keys: Float[Tensor, "rows heads columns size"]
    values: Float[Tensor, "rows heads columns value_size"]
    is_sliding = False  # the prepared mask applies a sliding window

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor, formats: AttentionFormats | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.column = keys, values, column
        self.formats = formats or AttentionFormats()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the storage is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the column of the step's token in the format of the cache."""
        self.keys.index_copy_(2, self.column, self.formats.in_cache(key_states))
        self.values.index_copy_(2, self.column, self.formats.in_cache(value_states))
        return self.formats.hand_over(self.keys, self.values)

    def get_seq_length(self) -> int:
        """Columns that are attended to before the new one is written."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Columns of the storage."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in `transformers` 4."""
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of decoding: feed the last tokens, and choose the next ones."""

    passes: Passes
    state: Buffers
    """The rows that are computed, and the columns that they attend to."""
    is_end: Bool[Tensor, " vocabulary"]
    """Whether each token ends a response."""
    settings: SamplingSettings

    def __call__(self) -> None:
        """Take the step; it launches the same work every time, and waits for nothing."""
        state, columns = self.state, self.state.keys[0].shape[2]
        state.column.add_(1)
        position = (state.column - state.left)[:, None]
        masks = self.passes.pattern.masks(state.column, state.left, columns, self.passes.model.dtype)
        pairs = zip(state.keys, state.values, strict=True)
        layers: list[Any] = [
            StaticLayer(keys, values, state.column, self.passes.cached.get(index))
            for index, (keys, values) in enumerate(pairs)
        ]
        column = state.column.squeeze(0)
        with noise_context(self.passes.model, self.passes.noise, row_ids(state.ids, position), column):
            logits = self.passes.model(
                input_ids=state.token[:, None],
                attention_mask=masks,
                position_ids=position,
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self.record(logits.float())

    def record(self, logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Choose a token of each row, and write it to the results."""
        state = self.state
        state.time.add_(1)
        uniforms = None
        if self.settings.temperature > 0:
            uniforms = state.uniforms.index_select(1, state.time)[:, 0]
        tokens, logprobs = choose(logits, uniforms, self.settings)
        finite = logprobs.isfinite()
        stopped = (self.is_end[tokens] | ~finite) & state.running
        slot, time = state.slot, state.time.expand_as(state.slot)
        state.tokens.index_put_((slot, time), tokens)
        state.logprobs.index_put_((slot, time), logprobs)
        state.length.index_put_((slot,), torch.where(stopped, time + finite.long(), state.length[slot]))
        state.truncated.index_put_((slot,), torch.where(stopped, ~finite, state.truncated[slot]))
        state.nonfinite.index_put_((slot,), torch.where(stopped, ~finite, state.nonfinite[slot]))
        state.running.logical_and_(~stopped)
        state.token.copy_(tokens)


def vacancies(running: Sequence[bool], rows: int) -> tuple[list[int], list[int], list[int]]:
    """How the running ones of a batch move into its first `rows` rows.

    Returns:
        The row whose state each of these rows has afterwards, the rows that are overwritten, and where from.
    """
    tails = [row for row in range(rows, len(running)) if running[row]]
    holes = [row for row in range(rows) if not running[row]][: len(tails)]
    keep = list(range(rows))
    for hole, tail in zip(holes, tails, strict=True):
        keep[hole] = tail
    return keep, holes, tails
