"""The decoder layers of a model, calibration batches, and hardware that is on in some layers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from roundoff.config import ConfigError
from roundoff.hardware import InstalledHardware, noise_key
from roundoff.hardware.installed import required
from roundoff.models.masks import row_ids
from roundoff.models.mode import evaluation_mode
from roundoff.models.prompts import Asked, Worked, encode
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_torch_state, refuse_autocast
from roundoff.tasks import Task

SCAN_BATCHES = 4
"""Batches into which the texts of a scan are split."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """One batch of texts as token ids."""

    tokens: Int[Tensor, "texts columns"]
    """Token ids, int64."""
    mask: Bool[Tensor, "texts columns"]
    """True on tokens, False on padding, which may be on either side."""
    first: int = 0
    """Number of the first text, counted over all batches: it gives each text row ids of its own."""

    @property
    def count(self) -> int:
        """Number of tokens, without padding."""
        return int(self.mask.sum())

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a model's forward pass."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask.to(torch.int64),
            "position_ids": self.positions(),
            "use_cache": False,
        }

    def positions(self) -> Int[Tensor, "texts columns"]:
        """Position of each token, counted without padding."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def rows(self) -> Int[Tensor, "texts columns"]:
        """Row ids, which key the hardware's noise."""
        ids = torch.arange(self.first, self.first + len(self.tokens), device=self.tokens.device)
        return row_ids(ids, self.positions())


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked],
    *,
    max_tokens: int = 512,
    batches: int = 2,
    max_length: int = 256,
) -> list[dict[str, Int[Tensor, "_texts _columns"]]]:
    """Calibration batches from texts, as a tokenizer would return them (`input_ids`, `attention_mask`).

    Problems are encoded as in training (see `roundoff.models.prompts`). Text i goes to batch `i % batches`, so that the
    batches are alike; `roundoff.scan` compares the even batches with the odd ones.

    Args:
        tokenizer: of the model that will read the batches.
        texts: taken in order until they hold `max_tokens`.
        max_tokens: tokens in all batches together; the last text is cut there.
        batches: number of batches; fewer if there are fewer texts.
        max_length: tokens at which each text is cut.

    Raises:
        ConfigError: if the texts hold no token.
    """
    rows: list[list[int]] = []
    count = 0
    for text in texts:
        ids = encode(tokenizer, [text])[0][:max_length]
        if ids:
            rows.append(ids[: max_tokens - count])
            count += len(rows[-1])
        if count >= max_tokens:
            break
    if not rows:
        raise ConfigError(f"the calibration text holds no token: {len(texts)} texts were given, all empty")
    encoded = []
    for part in (rows[i::batches] for i in range(min(batches, len(rows)))):
        width = max(map(len, part))
        tokens = torch.zeros(len(part), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(part):  # left-padded, as in sampling; padding is masked, so any id will do
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        encoded.append({"input_ids": tokens, "attention_mask": mask})
    return encoded


def read_batches(
    batches: Sequence[Mapping[str, Shaped[Tensor, "_texts _columns"]]], device: torch.device
) -> list[Calibration]:
    """Checked calibration batches on a device, from what a tokenizer returns.

    Texts without a token are dropped. A single batch of several texts is split into two.

    Raises:
        ConfigError: if the batches hold no token, or one of them is not what a tokenizer returns.
    """
    calibrations: list[Calibration] = []
    first = 0
    for number, batch in enumerate(batches):
        tokens: Any = batch.get("input_ids")
        attention = batch.get("attention_mask")
        fits = (
            isinstance(tokens, Tensor) and tokens.dim() == 2 and (attention is None or attention.shape == tokens.shape)
        )
        if not fits:
            has = (f"{name} {list(getattr(value, 'shape', ['?']))}" for name, value in batch.items())
            raise ConfigError(
                f"calibration batch {number} must hold tensors input_ids [N, S] and, if any, attention_mask [N, S], "
                f"but has {', '.join(has) or 'nothing'}"
            )
        tokens = tokens.to(device)
        mask = torch.ones_like(tokens, dtype=torch.bool) if attention is None else attention.to(device).bool()
        used = mask.any(dim=1)
        tokens, mask = tokens[used], mask[used]
        if len(tokens):
            calibrations.append(Calibration(tokens, mask, first))
            first += len(tokens)
    if not calibrations:
        raise ConfigError("the calibration text holds no token: give at least one batch with a token")
    if len(calibrations) == 1 and len(calibrations[0].tokens) > 1:
        single = calibrations[0]
        return [Calibration(single.tokens[i::2], single.mask[i::2], i * len(single.tokens)) for i in range(2)]
    return calibrations


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers of a model by index, in ascending order.

    Raises:
        ConfigError: if no numbered list of modules holds a Linear, or if more than one does.
    """
    stacks: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            stack = stacks.setdefault(".".join(parts[:at]), {})
            stack.setdefault(int(parts[at]), model.get_submodule(".".join(parts[: at + 1])))
    if len(stacks) > 1:
        raise ConfigError(f"the model has more than one stack of layers: {', '.join(stacks)}; a scan takes one decoder")
    if not stacks:
        children = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"{type(model).__name__} has no decoder layers: no Linear is in a numbered list of modules "
            f"(its parts: {children or 'none'})"
        )
    (stack,) = stacks.values()
    return dict(sorted(stack.items()))


def draw_of(model: nn.Module, key: Key, batch: Calibration) -> AbstractContextManager[None]:
    """A block inside which the installed hardware draws its noise by key and row id.

    Hardware that draws nothing gets no key. (In a mixture of experts some Linears see only some of the tokens, which
    row ids do not allow.)
    """
    return noise_key(model, key, batch.rows()) if required(model).in_force.hardware.is_noisy else nullcontext()


@contextmanager
def in_force_on(installed: InstalledHardware, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block, the hardware is on in these modules only; afterwards it is off."""
    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(lambda *_: installed.switch(True)))
            handles.append(layer.register_forward_hook(lambda *_: installed.switch(False), always_call=True))
        installed.switch(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        installed.switch(False)


@contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in which no parameter requires a gradient, under torch settings of our own.

    Everything is restored on leaving. Gradients of activations can still be computed.

    Raises:
        RuntimeError: under `torch.autocast`.
    """
    refuse_autocast("a scan", next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with own_torch_state(), evaluation_mode(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def calibration_texts(task: Task) -> list[Worked]:
    """The training problems of a task, each with a worked solution where the task has one."""
    return [Worked(problem, task.solution(problem) or "") for problem in task.train()]


CHUNK_TOKENS = 256
"""Tokens whose softmax or log-softmax is held at once."""


def text_kl(
    clean: Float[Tensor, "texts columns vocabulary"],
    perturbed: Float[Tensor, "texts columns vocabulary"],
    mask: Bool[Tensor, "texts columns"],
) -> list[float]:
    """KL divergence from clean to perturbed logits, summed over the tokens of each text, in nats."""
    kl = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    parts = []
    for p, q in zip(*(torch.split(z[mask], CHUNK_TOKENS) for z in (clean, perturbed)), strict=True):
        p, q = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
        parts.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    kl[mask] = torch.cat(parts)
    return [float(total) for total in kl.sum(1)]
