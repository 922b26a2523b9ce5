"""Sampled completions as padded tensors.

Axes: N rollouts, P prompt columns, T response columns. Row n is padding, its prompt up to column P, its response from
there on, padding. The G rollouts of a prompt (a group) lie next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from roundoff.numerics.rng import Key


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from a model, with what is needed to train on them."""

    tokens: Tensor
    """[N, P+T] int64: left-padded prompt, then response, padded to the right."""
    attention_mask: Tensor
    """[N, P+T] bool: True on tokens, False on padding."""
    prompt_length: int
    """P, tokens of the longest prompt."""
    response_mask: Tensor
    """[N, T] bool: True on sampled tokens, the end token included."""
    logprobs: Tensor
    """[N, T] float32: log-probability of each sampled token at the sampling temperature (nats), 0 on padding."""
    texts: list[str]
    """N responses without special tokens."""
    truncated: Tensor
    """[N] bool: no end token within the limit."""
    nonfinite: Tensor
    """[N] bool: ended early because the model's output was not finite (these are `truncated` too)."""
    rows: Tensor
    """[N, P+T] int64: row ids of the tokens, `rollout_id * 2**20 + position`."""
    group_size: int
    """G: the group of rollout n is `n // group_size`, as long as whole groups are selected."""
    noise_key: Key
    """Key of the hardware's draws: `token_logprobs(..., rows=rows, key=noise_key)` meets them again."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """[N] tokens of each response, the end token included."""
        return self.response_mask.sum(dim=1)

    def select(self, index: Tensor | Sequence[int], *, trim: bool = True) -> Rollouts:
        """The rollouts at `index`, in that order; with `trim`, without columns that are padding in all of them."""
        chosen = torch.as_tensor(index, dtype=torch.int64, device=self.tokens.device)
        taken = {f.name: getattr(self, f.name) for f in fields(self)}
        taken = {name: value[chosen] for name, value in taken.items() if isinstance(value, Tensor)}
        picked = replace(self, texts=[self.texts[i] for i in chosen.tolist()], **taken)
        return picked.trimmed() if trim else picked

    def trimmed(self) -> Rollouts:
        """The same rollouts without columns that are padding in all (one prompt and one response column stay)."""
        used = self.attention_mask.any(dim=0)
        left = min(int(used.to(torch.uint8).argmax()), self.prompt_length - 1)
        response = max(1, int(self.lengths.amax())) if len(self) else 1
        sequence = slice(left, self.prompt_length + response)
        return replace(
            self,
            tokens=self.tokens[:, sequence],
            attention_mask=self.attention_mask[:, sequence],
            rows=self.rows[:, sequence],
            prompt_length=self.prompt_length - left,
            response_mask=self.response_mask[:, :response],
            logprobs=self.logprobs[:, :response],
        )


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """All rollouts of `parts`, one after the other, padded to common widths.

    Raises:
        ValueError: if there is none, or if they were not sampled under one key with one group size: noise is keyed by
            row ids, so parts of one batch share a key and have rollout ids of their own.
    """
    if not parts or any((p.group_size, p.noise_key) != (parts[0].group_size, parts[0].noise_key) for p in parts):
        raise ValueError("parts must be one or more rollouts sampled under one key with one group size")
    prompt = max(part.prompt_length for part in parts)
    response = max(part.response_mask.shape[1] for part in parts)

    def joined(name: str, fill: int = 0) -> Tensor:
        def widened(part: Rollouts) -> Tensor:
            left = prompt - part.prompt_length if name in ("tokens", "attention_mask", "rows") else 0
            right = response - part.response_mask.shape[1]
            return torch.nn.functional.pad(getattr(part, name), (left, right), value=fill)

        return torch.cat([widened(part) for part in parts])

    return replace(
        parts[0],
        tokens=joined("tokens", parts[0].pad_token_id),
        attention_mask=joined("attention_mask"),
        prompt_length=prompt,
        response_mask=joined("response_mask"),
        logprobs=joined("logprobs"),
        texts=[text for part in parts for text in part.texts],
        truncated=torch.cat([part.truncated for part in parts]),
        nonfinite=torch.cat([part.nonfinite for part in parts]),
        rows=joined("rows"),
    )
