"""Sampled completions as padded tensors.

A row holds padding, the prompt, which ends at column `prompt_length`, the response, and padding again. The rollouts of
one prompt (a group) are adjacent. `columns` means prompt and response together; `tokens` means response columns. All
tensors are in host memory, whatever the model's device: what is trained on is decided there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roundoff.numerics.rng import Key


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from a model, with everything that training on them needs."""

    tokens: Int[Tensor, "rollouts columns"]
    """Token ids, int64: left-padded prompt, then response, padded on the right."""
    attention_mask: Bool[Tensor, "rollouts columns"]
    """True on tokens, False on padding."""
    prompt_length: int
    """Number of tokens of the longest prompt, and thus of prompt columns."""
    response_mask: Bool[Tensor, "rollouts tokens"]
    """True on sampled tokens, the end token included."""
    logprobs: Float[Tensor, "rollouts tokens"]
    """Log-probability of each sampled token at the sampling temperature, float32, in nats; 0 on padding."""
    texts: list[str]
    """Each response as text, without special tokens."""
    truncated: Bool[Tensor, " rollouts"]
    """Whether the response has no end token within the length limit."""
    nonfinite: Bool[Tensor, " rollouts"]
    """Whether the response ended early because the model's output was not finite; such a one is `truncated` too."""
    rows: Int[Tensor, "rollouts columns"]
    """Row id of each token, int64: `rollout_id * 2**20 + position`."""
    group_size: int
    """Number of rollouts per prompt. Rollout n is in group `n // group_size`, as long as entire groups are selected."""
    noise_key: Key
    """Key of the hardware's draws; `token_logprobs(..., rows=rows, key=noise_key)` repeats them."""
    pad_token_id: int
    """Id of the padding token."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Int[Tensor, " rollouts"]:
        """Number of tokens of each response, the end token included."""
        return self.response_mask.sum(dim=1)

    def select(self, index: Int[Tensor, " selected"] | Sequence[int], *, trim: bool = True) -> Rollouts:
        """The rollouts at `index`, in that order; with `trim`, without columns that are padding in all of them."""
        places = torch.as_tensor(index, dtype=torch.int64)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: value[places] for name, value in values.items() if isinstance(value, Tensor)}
        selection = replace(self, texts=[self.texts[i] for i in places.tolist()], **tensors)
        return selection.trimmed() if trim else selection

    def part(self, rows: slice) -> Rollouts:
        """Consecutive rollouts, with every column."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, texts=self.texts[rows], **tensors)

    def trimmed(self) -> Rollouts:
        """The same rollouts without columns that are padding in all; one prompt and one response column always stay."""
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
    """All rollouts of `parts`, one part after the other, padded to common widths.

    Noise is keyed by row ids, so the parts must share one key and have rollout ids of their own.

    Raises:
        ValueError: if there are no parts, or if they differ in noise key or group size.
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
