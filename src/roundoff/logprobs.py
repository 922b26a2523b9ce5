"""Log-probabilities of given responses: the pass that training differentiates.

Positions, masks and row ids are those of sampling (`masks.py`), so that on clean arithmetic the result equals what the
sampler recorded up to float32 rounding, and on noisy hardware too, given the sampler's key.

**Memory.** Logits exist for response tokens alone, `[N, T, V]` in the model's dtype, once; prompt tokens and the last
token never reach `lm_head`. The log-softmax is computed over `chunk` tokens at a time, and its backward pass writes one
more `[N, T, V]`, the gradient. To hold less, pass fewer rollouts at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from roundoff.hardware.install import installed, noise_key
from roundoff.masks import AttentionPattern, left_padding, positions
from roundoff.models.dropout import dropout_draws
from roundoff.numerics.rng import Key

CHUNK_TOKENS = 4096
"""Response tokens whose log-softmax is computed at once (float32; 4,096 x 150,000 words are 2.5 GB)."""


def token_logprobs(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    response_length: int,
    *,
    temperature: float,
    rows: Tensor | None = None,
    key: Key | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N, T] float32 of the last `response_length` = T columns of `tokens` (nats).

    Both are those of `softmax(logits / temperature)` over the full vocabulary, and 0 on padding. The gradient flows
    through the log-probabilities; entropies are detached.

    Args:
        model: called as it is, with its hardware, in the mode (training or evaluation) it is in.
        tokens: [N, P+T] int64, left-padded prompts then responses.
        attention_mask: [N, P+T], non-zero on tokens.
        response_length: T.
        temperature: of sampling, above 0.
        rows: [N, P+T] int64 row ids that key the hardware's noise; needed with `key`.
        key: under which every noisy product (and dropout) inside draws. None: the hardware's own call counter.
        chunk: response tokens whose log-softmax is computed at once (tokens); changes memory, not the result.

    Raises:
        ValueError: on shapes that do not fit, a temperature of 0, or a key without row ids.
    """
    _check(tokens, attention_mask, response_length, temperature, rows, key)
    mask = attention_mask.bool()
    first, last = _used_columns(mask, response_length)
    columns = slice(first, last)  # of the input: the last token predicts nothing
    left = left_padding(mask[:, columns])
    width = last - first
    queries = torch.arange(width, device=tokens.device)
    kept = last - (tokens.shape[1] - response_length - 1)
    with noise_context(model, key, None if rows is None else rows[:, columns]):
        logits = model(
            input_ids=tokens[:, columns],
            attention_mask=AttentionPattern.of(model).masks(queries, left, width, model.dtype),
            position_ids=positions(left, width),
            use_cache=False,
            logits_to_keep=kept,
        ).logits[:, -kept:]
    response = slice(tokens.shape[1] - response_length, last + 1)
    targets, inside = tokens[:, response], mask[:, response]
    logprobs, entropy = _LogProbs.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), float(temperature), chunk
    )
    missing = (0, response_length - kept)
    logprobs, entropy = (torch.where(inside, x.view_as(inside), 0.0) for x in (logprobs, entropy))
    return pad(logprobs, missing), pad(entropy, missing)


@contextmanager
def noise_context(model: PreTrainedModel, key: Key | None, rows: Tensor | None) -> Iterator[None]:
    """Inside, the hardware and adapters' dropout draw by `key` and row ids [N, S]; without a key nothing changes."""
    if key is None:
        yield
        return
    hardware = nullcontext() if installed(model) is None else noise_key(model, key, rows)
    with dropout_draws(model, key, rows), hardware:
        yield


def is_noisy(model: PreTrainedModel) -> bool:
    """Whether two passes of the model over one input differ: hardware is in force, and it draws."""
    found = installed(model)
    return found is not None and found.is_on and found.hardware.is_noisy


def _used_columns(mask: Tensor, response_length: int) -> tuple[int, int]:
    """First column that holds a token, and the last one (at least the first response column)."""
    used = mask.any(dim=0).nonzero()
    start = mask.shape[1] - response_length
    if not len(used):
        return start - 1, start
    return min(int(used[0]), start - 1), max(int(used[-1]), start)


class _LogProbs(torch.autograd.Function):
    """Log-softmax at the targets, and entropy, chunk by chunk: keeps the logits and two numbers a token.

    With z = logits / temperature: logprob = z_target - logsumexp(z), entropy = logsumexp(z) - sum softmax(z)*z, and
    d logprob / d logits = (onehot(target) - softmax(z)) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        parts = []
        for some, target in zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True):
            log_softmax = torch.log_softmax(some.float() / temperature, dim=-1)  # [chunk, V]
            # 0*log(0) is 0: a token of probability zero has log-probability -inf or a huge negative number
            surprise = log_softmax.exp() * log_softmax.clamp(min=torch.finfo(torch.float32).min)
            parts.append((log_softmax.gather(1, target[:, None])[:, 0], -surprise.sum(dim=-1)))
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        chunks = [torch.split(x, ctx.chunk) for x in (logits, targets, gradient / ctx.temperature, result)]
        for some, target, g, out in zip(*chunks, strict=True):
            softmax = torch.softmax(some.float() / ctx.temperature, dim=-1).mul_(-g[:, None])
            out.copy_(softmax.scatter_add_(1, target[:, None], g[:, None]))
        return result, None, None, None


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
    if key is not None and rows is None:
        raise ValueError("rows must be given with key: noise is drawn by (key, row id)")
