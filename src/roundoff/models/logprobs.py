"""Log-probabilities of existing responses: the pass that training differentiates.

Positions, masks and row ids are those of sampling (`roundoff.models.masks`). On clean arithmetic the result therefore
equals what the sampler recorded, up to float32 rounding; on noisy hardware it does so under the sampler's key. Where
nothing draws, the rollouts of one prompt share one pass over it (`roundoff.models.packing`).

**Memory.** Prompt tokens and the last token never reach the output layer. If the logits of all response tokens take
more than `LOGIT_BYTES`, the output layer is computed for a chunk of tokens at a time, and once more in the backward
pass, so that only one hidden vector per token is kept. This is not possible for models that do more to their logits
than one matrix product (soft caps, scales), which a comparison of bits on a few tokens detects, nor for noisy output
layers, whose draws belong to a pass as a whole. Both keep all logits, [response tokens, vocabulary], and their
gradient.

**Devices.** Where each token goes is worked out in host memory. A pass over tokens that are there does not wait for the
device; one over tokens on the device waits once, to fetch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from roundoff.config import TEMPERATURE_RULE, is_temperature
from roundoff.hardware import installed
from roundoff.hardware.linear import HardwareLinear
from roundoff.models.draws import noise_context
from roundoff.models.keyed_dropout import is_dropping
from roundoff.models.masks import AttentionPattern
from roundoff.models.packing import Layout, packed, plain
from roundoff.models.position_limit import check_lengths
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_torch_state, refuse_autocast
from roundoff.numerics.transfer import fetch, put

LOGIT_BYTES = 1 << 26
"""Bytes of logits held at once; in float32 that is 341 tokens of a vocabulary of 49,152, or 110 of one of 152,000."""

PROBED = 4
"""Number of tokens on which the output layer over the decoder is compared with the complete model."""
LEAN = "lean_heads"
"""Attribute of a model that holds the results of these comparisons, by the class of the output layer."""


def token_logprobs(
    model: PreTrainedModel,
    tokens: Int[Tensor, "rollouts columns"],
    attention_mask: Shaped[Tensor, "_rollouts _columns"],
    response_length: int,
    *,
    temperature: float,
    rows: Int[Tensor, "_rollouts _columns"] | None = None,
    key: Key | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "rollouts tokens"], Float[Tensor, "rollouts tokens"]]:
    """Log-probabilities and entropies of the last `response_length` columns of `tokens`: float32, in nats.

    Both are those of `softmax(logits / temperature)` over the full vocabulary, and 0 on padding. The gradient flows
    through both.

    Args:
        model: called in the state it is in: its hardware on or off, in training or evaluation mode.
        tokens: [rollouts, columns] int64, left-padded prompts followed by responses, in host memory or on the model's
            device. Where nothing draws, adjacent rollouts of one prompt share one pass over it.
        attention_mask: [rollouts, columns], non-zero on tokens.
        response_length: number of columns that hold the responses.
        temperature: of sampling, above 0.
        rows: [rollouts, columns] int64 row ids, which key the hardware's noise; required with `key`.
        key: under which every noisy product (and dropout) draws. None: by the hardware's own call counter.
        chunk: tokens whose logits are computed at once; it changes memory, not the result. None: as many as
            `LOGIT_BYTES` hold.

    Raises:
        ValueError: if shapes do not fit, the logits cannot be divided by the temperature, or a key comes without row
            ids.
        RuntimeError: under `torch.autocast`.
    """
    _check(tokens, attention_mask, response_length, temperature, rows, key)
    refuse_autocast("a training pass", model.device)
    if rows is None:
        tokens, attention_mask = fetch([tokens, attention_mask])
    else:
        tokens, attention_mask, rows = fetch([tokens, attention_mask, rows])
    with own_torch_state():
        return _token_logprobs(model, tokens, attention_mask, response_length, temperature, rows, key, chunk)


def _token_logprobs(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    response_length: int,
    temperature: float,
    rows: Tensor | None,
    key: Key | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """See `token_logprobs`; the tensors are in host memory."""
    check_lengths(model, attention_mask)
    device = model.device
    mask, pattern = attention_mask.bool(), AttentionPattern.of(model)
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    shared = None if _draws(model) else packed(tokens, mask, response_length, pattern, model.dtype, hidden, device)
    layout = shared or plain(tokens, mask, response_length, rows, pattern, model.dtype, device)
    targets = tokens[layout.rollout, tokens.shape[1] - response_length + layout.index]
    order = layout.source.argsort(stable=True)  # sorted by logits: each row of logits with the tokens it predicts
    numbers = torch.stack([layout.source, targets, layout.rollout, layout.index])[:, order]
    there = put(numbers, device)
    wanted = Targets(there[0], there[1], there[2], there[3], numbers[0])
    results = None
    with noise_context(model, None if shared else key, layout.rows, real=layout.real):
        head = _lean_head(model, tokens, len(layout.tokens) * layout.kept, chunk)
        if head is not None:
            states = _decoder(model)(**_inputs(layout)).last_hidden_state[:, -layout.kept :].flatten(0, 1)
            results = _in_parts(head, states, wanted, float(temperature), chunk)
        else:
            logits = model(**_inputs(layout), logits_to_keep=layout.kept).logits[:, -layout.kept :].flatten(0, 1)
    if results is None:
        size = chunk or _tokens_at_once(logits.shape[1])
        parts = wanted.bounds(len(logits), size)
        results = _LogProbs.apply(  # type: ignore[no-untyped-call]
            logits, wanted.source, wanted.token, float(temperature), size, parts
        )
    place = wanted.rollout, wanted.index
    empty = torch.zeros(len(tokens), response_length, dtype=torch.float32, device=device)
    return empty.index_put(place, results[0]), empty.index_put(place, results[1])


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens to score, in the order of the logits that predict them; on the model's device."""

    source: Int[Tensor, " targets"]
    """Index of the row of logits that predicts each token, ascending."""
    token: Int[Tensor, " targets"]
    """Id of each token."""
    rollout: Int[Tensor, " targets"]
    """Index of its rollout."""
    index: Int[Tensor, " targets"]
    """Index within its response."""
    host_source: Int[Tensor, " targets"]
    """`source` in host memory."""

    def bounds(self, count: int, size: int) -> list[int]:
        """Where the targets of each `size` of `count` rows of logits begin, and where the last ones end."""
        starts = torch.tensor([*range(0, count, size), count])
        bounds: list[int] = torch.searchsorted(self.host_source, starts).tolist()
        return bounds


def _inputs(layout: Layout) -> dict[str, Any]:
    return {
        "input_ids": layout.tokens,
        "attention_mask": layout.masks,
        "position_ids": layout.position,
        "use_cache": False,
    }


def _tokens_at_once(vocabulary: int) -> int:
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def _draws(model: PreTrainedModel) -> bool:
    """Whether every rollout needs its own pass over its prompt: draws by row id, or formats of gradients."""
    state = installed(model)
    if state is None or not state.is_on:
        return is_dropping(model)
    return state.in_force.hardware.separates_rollouts or is_dropping(model)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its output layer."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


def _lean_head(model: PreTrainedModel, tokens: Tensor, count: int, chunk: int | None) -> nn.Module | None:
    """The output layer if it can and should be computed in chunks: many logits, and nothing else done to them.

    Args:
        model: the model.
        tokens: the tokens of the pass, in host memory.
        count: number of rows of logits.
        chunk: as in `token_logprobs`.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) not in (nn.Linear, HardwareLinear):
        return None
    if count <= (chunk or _tokens_at_once(head.out_features)):
        return None
    if type(head) is HardwareLinear and head.hardware_state.needs_all_tokens:
        return None
    known: dict[type, bool] = model.__dict__.setdefault(LEAN, {})
    if type(head) not in known:
        known[type(head)] = _is_all(model, head, tokens)
    return head if known[type(head)] else None


def _is_all(model: PreTrainedModel, head: nn.Module, tokens: Tensor) -> bool:
    """Whether the logits are the output layer's, and nothing else is done to them.

    The model and its output layer over its decoder must give the same bits on single tokens, under one draw. Several
    tokens are tried because one may have logits of zero (the embedding of padding), which a soft cap does not change.
    """
    single = put(torch.unique(tokens)[-PROBED:, None], model.device)
    with torch.no_grad(), noise_context(model, Key.from_seed(0), torch.zeros_like(single)):
        token = {"input_ids": single, "use_cache": False}
        complete, lean = model(**token).logits, head(_decoder(model)(**token).last_hidden_state)
    return torch.equal(complete, lean)


def _in_parts(
    head: nn.Module, hidden: Tensor, wanted: Targets, temperature: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [K] of targets from hidden states [M, H], with logits for `chunk` at a time."""

    def part(states: Tensor, at: Tensor, part_targets: Tensor) -> tuple[Tensor, Tensor]:
        bounds = [0, len(at)]
        return _LogProbs.apply(head(states), at, part_targets, temperature, len(states), bounds)  # type: ignore

    size = chunk or _tokens_at_once(head.out_features)  # type: ignore[arg-type]
    parts = []
    for start, states, (first, last) in _chunks(hidden, wanted.bounds(len(hidden), size), size):
        if first < last:  # padding has no targets
            arguments = states, wanted.source[first:last] - start, wanted.token[first:last]
            parts.append(checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False))
    if not parts:
        return hidden.new_zeros(0), hidden.new_zeros(0)
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, entropy


def _chunks(values: Tensor, bounds: list[int], size: int) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
    """Chunks of `values` [M, ...]: where each begins, the chunk, and the range of its targets (`Targets.bounds`)."""
    for number, part in enumerate(torch.split(values, size)):
        yield number * size, part, (bounds[number], bounds[number + 1])


class _LogProbs(torch.autograd.Function):
    """Log-softmax at the targets, and entropy, chunk by chunk: keeps the logits and two numbers per token.

    With z = logits[source] / temperature and p = softmax(z): logprob = z_target - logsumexp(z) and entropy
    H = logsumexp(z) - sum p*z; d logprob / d z = onehot(target) - p, and d H / d z = -p * (log p + H). Several targets
    may share a row of logits (the first tokens of the rollouts of one prompt); `source` [K] is in ascending order, and
    `bounds` says which of it belong to each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, source: Tensor, targets: Tensor, temperature: float, chunk: int, bounds: list[int]
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(source), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(logprobs)
        for start, part, (first, last) in _chunks(logits, bounds, chunk):
            at = source[first:last] - start
            log_softmax = torch.log_softmax(part.float() / temperature, dim=-1)  # [chunk, V]
            logprobs[first:last] = log_softmax[at, targets[first:last]]
            # 0*log(0) counts as 0: a token of probability zero has log-probability -inf or a huge negative number
            surprise = log_softmax.exp().mul_(log_softmax.clamp_(min=torch.finfo(torch.float32).min))
            entropy[first:last] = -surprise.sum(dim=-1)[at]
        ctx.save_for_backward(logits, source, targets)
        ctx.temperature, ctx.chunk, ctx.bounds = temperature, chunk, bounds
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        logits, source, targets = ctx.saved_tensors
        if gradient is None and entropy_gradient is None:
            return None, None, None, None, None, None
        if gradient is None:
            gradient = torch.zeros(len(source), dtype=torch.float32, device=logits.device)
        else:
            gradient = gradient / ctx.temperature
        result = torch.empty_like(logits)
        for start, part, (first, last) in _chunks(logits, ctx.bounds, ctx.chunk):
            at, target_gradient = source[first:last] - start, gradient[first:last]
            total = target_gradient.new_zeros(len(part)).index_add_(0, at, target_gradient)
            log_softmax = torch.log_softmax(part.float() / ctx.temperature, dim=-1)
            softmax = log_softmax.exp()
            logit_gradient = softmax * -total[:, None]
            logit_gradient.view(-1).scatter_add_(0, at * part.shape[1] + targets[first:last], target_gradient)
            if entropy_gradient is not None:
                share = total.zero_().index_add_(0, at, entropy_gradient[first:last] / ctx.temperature)
                # 0*log(0) counts as 0, as in the forward pass
                log_softmax.clamp_(min=torch.finfo(torch.float32).min)
                entropy = -(softmax * log_softmax).sum(dim=-1, keepdim=True)
                logit_gradient -= share[:, None] * softmax * (log_softmax + entropy)
            result[start : start + len(part)] = logit_gradient
        return result, None, None, None, None, None


def _check(
    tokens: Tensor, mask: Tensor, response_length: int, temperature: float, rows: Tensor | None, key: Key | None
) -> None:
    if tokens.ndim != 2 or mask.shape != tokens.shape or (rows is not None and rows.shape != tokens.shape):
        shapes = [None if t is None else list(t.shape) for t in (tokens, mask, rows)]
        raise ValueError(f"tokens, attention_mask and rows must be of one shape [N, P+T], but are {shapes}")
    if not 1 <= response_length < tokens.shape[1]:
        raise ValueError(
            f"response_length must be in [1, {tokens.shape[1] - 1}], to leave a prompt column, but is {response_length}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 (greedy responses: score them at 1), but is {temperature}")
    if not is_temperature(temperature):
        raise ValueError(f"temperature must be {TEMPERATURE_RULE}, but is {temperature}")
    if key is not None and rows is None:
        raise ValueError("rows must be given with key: noise is drawn by (key, row id)")
