"""Sampling rollouts from a causal `transformers` model: batched, with a key-value cache, under any hardware.

Prompts are sorted by length, left-padded and decoded together; a rollout that has ended leaves the batch. Results come
back in the order of the prompts, with the rollouts of a prompt next to each other.

**Randomness.** The token of rollout r at response index t is drawn by inverse transform from one uniform number that
depends on (key, rollout id of r, t) and nothing else: `token = min{i : p_0 + ... + p_i > u}`, summed in float64. A
batch that is split, sorted or thinned out in another way gives the same text, with one caveat: a matrix product over
another number of rows may round differently, and a token changes if its `u` is within that rounding (about 1e-6) of a
boundary.

**Hardware.** The model's products run on the installed hardware of rollouts, or on that of the `hardware_phase` in
which `sample` is called, in its own forward pass or in the fused
one (`roundoff.sampling.fused_decoder`). Noise is keyed by row ids (`roundoff.models.masks.row_ids`) under
`key.fold("noise")`, which `Rollouts.noise_key` records. On noisy hardware each rollout has its own pass over its
prompt, as on the chip. Otherwise the rollouts of a prompt share one pass, and with the fused pass they share every
beginning that they have in common (`roundoff.sampling.decoding`).

**Log-probabilities** are those of the tokens under `softmax(logits / temperature)` over the full vocabulary, before the
cut by top-k and top-p, as in trl and verl. Greedy decoding (temperature 0) reports them at temperature 1. With
top_p = 1 and top_k = 0 this is the distribution that is sampled from.

**Devices.** Decoding asks a device which rollouts have ended once in `ASK_EVERY` tokens, and fetches the rollouts when
all of them have; nothing else waits for it. `Rollouts` are in host memory.

**A bad rollout is data.** Where the distribution is not finite, the rollout ends before that token with `nonfinite` and
`truncated` set; what it wrote before stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.config import ConfigError
from roundoff.hardware import rollout_phase
from roundoff.models.draws import is_noisy
from roundoff.models.logprobs import token_logprobs
from roundoff.models.masks import AttentionPattern, positions, row_ids
from roundoff.models.mode import evaluation_mode
from roundoff.models.position_limit import position_limit
from roundoff.models.prompts import Asked, encode
from roundoff.models.tokenizer import check_embedded, check_open, end_tokens
from roundoff.numerics.rng import Key, uniform
from roundoff.numerics.torch_state import own_torch_state, refuse_autocast
from roundoff.numerics.transfer import fetch, put
from roundoff.sampling.choice import SamplingSettings, choose
from roundoff.sampling.decoding import DecodingBatch, Passes, Prompts
from roundoff.sampling.fused_decoder import FusedDecoder
from roundoff.sampling.rollouts import Rollouts, concatenate
from roundoff.sampling.static_buffers import Buffers
from roundoff.sampling.static_decoder import StaticDecoder

__all__ = ["Rollouts", "concatenate", "sample", "token_logprobs"]

MAX_ROWS = 512
"""Rollouts decoded together; more are split into batches of similar prompt length."""
ASK_EVERY = 16
"""Tokens after which an accelerator is asked which rollouts have ended. A CPU is asked after every token, since asking
costs nothing there."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked] | Sequence[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    key: Key,
    rollout_ids: Int[Tensor, " rollouts"] | Sequence[int] | None = None,
    max_rows: int = MAX_ROWS,
) -> Rollouts:
    """Rollouts of `prompts`, `group_size` of each, in the order of the prompts.

    Args:
        model: called with its hardware as it is, in evaluation mode; its own mode is restored afterwards.
        tokenizer: encodes the prompts; its end token and those of the model's `generation_config` end a response.
        prompts: one or more texts or problems, which may repeat; `roundoff.models.prompts` defines how they are
            encoded. Lists of token ids are taken as they are.
        group_size: rollouts per prompt.
        max_new_tokens: length limit of a response in tokens, end token included.
        temperature: 0 takes the most likely token.
        top_p: samples from the smallest set of most likely tokens that holds this share of the probability.
        top_k: samples from the k most likely tokens (and those that tie with the last of them); 0 means all.
        key: of every draw. The same key and rollout ids give the same rollouts.
        rollout_ids: one whole number in [0, 2**43) for each rollout, by default 0, 1, 2, and so on. Calls under one key
            need ids of their own.
        max_rows: most rollouts decoded together; it changes memory and speed, not the result.

    Raises:
        ConfigError: if the model or tokenizer cannot be sampled from, or if a prompt encodes to nothing or leaves no
            room for the response within `max_position_embeddings`.
        ValueError: if an argument is out of range.
    """
    refuse_autocast("sampling", model.device)
    with own_torch_state(), evaluation_mode(model), rollout_phase(model):
        settings = SamplingSettings(max_new_tokens, temperature, top_p, top_k, *_special_tokens(model, tokenizer))
        encoded = _encode(model, tokenizer, prompts, max_new_tokens)
        return _sampled(model, tokenizer, encoded, settings, group_size, key, rollout_ids, max_rows)


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: SamplingSettings,
    group_size: int,
    key: Key,
    rollout_ids: Tensor | Sequence[int] | None,
    max_rows: int,
) -> Rollouts:
    """Sample from encoded prompts; see `sample`."""
    max_new_tokens = settings.max_new_tokens
    count = len(encoded) * group_size
    if group_size < 1 or max_rows < 1:
        raise ValueError(f"group_size and max_rows must be at least 1, but are {group_size} and {max_rows}")
    ids = torch.arange(count) if rollout_ids is None else torch.as_tensor(rollout_ids, dtype=torch.int64).cpu()
    if ids.shape != (count,) or not bool(((ids >= 0) & (ids < 2**43)).all()):
        raise ValueError(f"rollout_ids must be {count} whole numbers in [0, 2**43), but is {ids.tolist()[:4]}...")
    written = _Written.empty(count, settings, model.device)
    noise_key = key.fold("noise")
    # Short prompts first and equal ones next to each other: little padding, and one prefill for equal prompts.
    order = sorted(range(count), key=lambda n: (len(encoded[n // group_size]), encoded[n // group_size], n))
    passes = Passes(
        model=model,
        pattern=AttentionPattern.of(model),
        noise=noise_key if is_noisy(model) else None,
        fused=FusedDecoder.of(model, max(map(len, encoded)) + max_new_tokens),
        max_new_tokens=max_new_tokens,
    )
    for start in range(0, count, max_rows):
        places = order[start : start + max_rows]
        batch_ids = put(ids[places], model.device)
        texts = [encoded[n // group_size] for n in places]
        batch_prompts = Prompts.of(texts, settings.pad_token, model.device, alone=passes.noise is not None)
        shape = len(places), max_new_tokens
        uniforms = None
        if settings.temperature > 0:
            uniforms = uniform(key.fold("sample"), shape, rows=batch_ids)
        slots = put(places, model.device)
        static = None if passes.fused is not None else StaticDecoder.of(model)
        results = None
        if static is not None:
            results = static.decode(passes, batch_prompts, batch_ids, uniforms, settings, ASK_EVERY)
        if results is None:
            _decode(passes.batch(batch_prompts, batch_ids), written, slots, uniforms, settings)
        else:
            written.take(slots, results)
    return _assemble(written, [p for p in encoded for _ in range(group_size)], ids, group_size, noise_key, tokenizer)


@dataclass(slots=True)
class _Written:
    """What has been sampled so far; columns beyond a rollout's `length` hold arbitrary values."""

    tokens: Int[Tensor, "rollouts tokens"]
    logprobs: Float[Tensor, "rollouts tokens"]
    length: Int[Tensor, " rollouts"]
    truncated: Bool[Tensor, " rollouts"]
    nonfinite: Bool[Tensor, " rollouts"]
    pad_token: int

    @classmethod
    def empty(cls, count: int, settings: SamplingSettings, device: torch.device) -> _Written:
        T = settings.max_new_tokens
        return cls(
            tokens=torch.full((count, T), settings.pad_token, device=device),
            logprobs=torch.zeros(count, T, dtype=torch.float32, device=device),
            length=torch.full((count,), T, device=device),
            truncated=torch.ones(count, dtype=torch.bool, device=device),
            nonfinite=torch.zeros(count, dtype=torch.bool, device=device),
            pad_token=settings.pad_token,
        )

    def end(self, slots: Tensor, stopped: Tensor, finite: Tensor, t: int) -> None:
        """Record that the `stopped` rollouts among `slots` end with token t, or before it where it is not `finite`."""
        self.length[slots] = torch.where(stopped, t + finite.long(), self.length[slots])
        self.truncated[slots] = torch.where(stopped, ~finite, self.truncated[slots])
        self.nonfinite[slots] = torch.where(stopped, ~finite, self.nonfinite[slots])

    def take(self, slots: Tensor, results: Buffers) -> None:
        """Record a batch that was decoded in static buffers."""
        count, tokens = len(slots), self.tokens.shape[1]
        self.tokens[slots] = results.tokens[:count, :tokens]
        self.logprobs[slots] = results.logprobs[:count, :tokens]
        self.length[slots] = results.length[:count]
        self.truncated[slots] = results.truncated[:count]
        self.nonfinite[slots] = results.nonfinite[:count]


def _decode(
    batch: DecodingBatch, written: _Written, slots: Tensor, uniforms: Tensor | None, settings: SamplingSettings
) -> None:
    """Decode the rollouts in `slots` to their ends.

    `uniforms` [rollouts, max_new_tokens] choose the tokens; without them decoding is greedy.
    """
    running = torch.ones_like(slots, dtype=torch.bool)
    ask_every = 1 if slots.is_cpu else ASK_EVERY
    is_end: Tensor | None = None
    changed = False
    for t in range(settings.max_new_tokens):
        logits = batch.logits()
        if is_end is None:
            is_end = settings.ends(logits.shape[-1], logits.device)
        tokens, logprobs = choose(logits, None if uniforms is None else uniforms[:, t], settings)
        written.tokens[slots, t] = tokens
        written.logprobs[slots, t] = logprobs
        finite = logprobs.isfinite()
        stopped = (is_end[tokens] | ~finite) & running
        if not slots.is_cpu or stopped.any():
            written.end(slots, stopped, finite, t)
            running &= ~stopped
            changed = True
        if t + 1 == settings.max_new_tokens:
            return
        if changed and (t + 1) % ask_every == 0:
            changed = False
            (still,) = fetch([running])
            keep = batch.leave(still)
            if len(keep) < len(running):
                slots, running, tokens = slots[keep], running[keep], tokens[keep]
                uniforms = None if uniforms is None else uniforms[keep]
        if not len(tokens):
            return
        batch.feed(tokens)


def check_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_tokens: Sequence[int], max_new_tokens: int
) -> None:
    """Check that prompts of these lengths, in tokens, can be answered; called before anything is sampled.

    Raises:
        ConfigError: as in `sample`.
    """
    AttentionPattern.of(model)
    _special_tokens(model, tokenizer)
    (limit, reason), longest = position_limit(model), max(prompt_tokens, default=0)
    if not all(prompt_tokens):
        raise ConfigError("a prompt of the task encodes to no token at all: the model would have nothing to continue")
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and profile.training.max_new_tokens = {max_new_tokens} do not fit into the "
            f"{limit} {reason}: lower max_new_tokens, or leave long prompts out"
        )


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """Every token that ends a response, and the padding token."""
    ends = end_tokens(model, tokenizer)
    if not ends:
        raise ConfigError(
            "the tokenizer must have an end token, but tokenizer.eos_token is None: no response would end"
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer must have a pad token: set tokenizer.pad_token = tokenizer.eos_token")
    return tuple(sorted(ends)), int(tokenizer.pad_token_id)


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked] | Sequence[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of each prompt."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be one or more texts in a list, but is {prompts!r}")
    token_lists = [prompt for prompt in prompts if isinstance(prompt, list)]
    texts = [prompt for prompt in prompts if not isinstance(prompt, list)]
    if token_lists and texts:
        raise ValueError("prompts must all be texts or problems, or all be lists of token ids")
    encoded = token_lists or encode(tokenizer, texts)
    check_embedded(model, tokenizer, encoded)
    ends = () if token_lists else end_tokens(model, tokenizer)
    limit, reason = position_limit(model)
    for number, tokens in enumerate(encoded):
        if tokens and tokens[-1] in ends:
            check_open(tokenizer, tokens, ends, f"prompt {number}", "remove it")
        if not tokens:
            raise ConfigError(f"prompt {number} must encode to at least one token, but is {prompts[number]!r}")
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise ConfigError(
                f"prompt {number} has {len(tokens)} tokens: with max_new_tokens = {max_new_tokens} it does not fit "
                f"into the {limit} {reason}; shorten or filter it (training.max_prompt_tokens)"
            )
    return encoded


def _assemble(
    written: _Written,
    prompts: list[list[int]],
    ids: Tensor,
    group_size: int,
    noise_key: Key,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollouts:
    """The finished rollouts in host memory, padded to the columns that they need."""
    tokens, logprobs, length, truncated, nonfinite = fetch(
        [written.tokens, written.logprobs, written.length, written.truncated, written.nonfinite]
    )
    P, T = max(map(len, prompts)), max(1, int(length.max()))
    left = torch.tensor([P - len(prompt) for prompt in prompts])
    inside = torch.arange(T) < length[:, None]
    responses = tokens[:, :T].masked_fill(~inside, written.pad_token)
    padded = torch.tensor([[written.pad_token] * (P - len(prompt)) + prompt for prompt in prompts])
    each = [tuple(row[:n]) for row, n in zip(responses.tolist(), length.tolist(), strict=True)]
    distinct = list(dict.fromkeys(each))
    decoded = tokenizer.batch_decode(
        [list(text) for text in distinct], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    text_of = dict(zip(distinct, decoded, strict=True))
    return Rollouts(
        tokens=torch.cat([padded, responses], dim=1),
        attention_mask=torch.cat([torch.arange(P) >= left[:, None], inside], dim=1),
        prompt_length=P,
        response_mask=inside,
        logprobs=logprobs[:, :T].masked_fill(~inside, 0.0),
        texts=[text_of[response] for response in each],
        truncated=truncated,
        nonfinite=nonfinite,
        rows=row_ids(ids, positions(left, P + T)),
        group_size=group_size,
        noise_key=noise_key,
        pad_token_id=written.pad_token,
    )
