"""The decoder layers of a model, calibration batches, and hardware in force on some layers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from roundoff.config import ConfigError
from roundoff.hardware import InstalledHardware, noise_key
from roundoff.hardware.installed import required
from roundoff.models import mode
from roundoff.models.masks import row_ids
from roundoff.models.prompts import Asked, Worked, encode
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_torch_state, refuse_autocast
from roundoff.tasks import Task


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts as tokens; N texts, S columns."""

    tokens: Tensor
    """[N, S] int64."""
    mask: Tensor
    """[N, S] bool: True on tokens, False on padding (on either side)."""
    first: int = 0
    """Number of the first text, so that each has row ids of its own."""

    @property
    def count(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())

    def inputs(self) -> dict[str, Any]:
        """Arguments of a model's forward pass."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask.to(torch.int64),
            "position_ids": self.positions(),
            "use_cache": False,
        }

    def positions(self) -> Tensor:
        """Position [N, S] of each token, counted without padding."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def rows(self) -> Tensor:
        """Row ids [N, S] for the hardware's noise."""
        ids = torch.arange(self.first, self.first + len(self.tokens), device=self.tokens.device)
        return row_ids(ids, self.positions())


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked],
    *,
    max_tokens: int = 512,
    batches: int = 2,
    max_length: int = 256,
) -> list[dict[str, Tensor]]:
    """Whole texts, in order and each cut at `max_length` tokens, until they hold `max_tokens`; in `batches` batches.

    Problems are put to the model as in training (see `roundoff.models.prompts`).

    Text i goes to batch `i % batches`, so that the batches are alike, and `scan` compares the even with the odd ones.

    Raises:
        ConfigError: if the texts hold no token.
    """
    rows: list[list[int]] = []
    count = 0
    for text in texts:
        known = encode(tokenizer, [text])[0][:max_length]
        if known:
            rows.append(known[: max_tokens - count])
            count += len(rows[-1])
        if count >= max_tokens:
            break
    if not rows:
        raise ConfigError(f"the calibration text holds no token: {len(texts)} texts were given, all empty")
    found = []
    for part in (rows[i::batches] for i in range(min(batches, len(rows)))):
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):  # left-padded, as in sampling; padding is masked, so any id serves
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def read_batches(batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[Calibration]:
    """Calibration batches of what a tokenizer returns; a single batch of several texts is cut into two.

    Raises:
        ConfigError: if there is no token in them, or a batch is not what a tokenizer returns.
    """
    found: list[Calibration] = []
    first = 0
    for number, batch in enumerate(batches):
        tokens: Any = batch.get("input_ids")
        given = batch.get("attention_mask")
        fits = isinstance(tokens, Tensor) and tokens.dim() == 2 and (given is None or given.shape == tokens.shape)
        if not fits:
            has = (f"{name} {list(getattr(value, 'shape', ['?']))}" for name, value in batch.items())
            raise ConfigError(
                f"calibration batch {number} must hold tensors input_ids [N, S] and, if any, attention_mask [N, S], "
                f"but has {', '.join(has) or 'nothing'}"
            )
        tokens = tokens.to(device)
        mask = torch.ones_like(tokens, dtype=torch.bool) if given is None else given.to(device).bool()
        used = mask.any(dim=1)
        tokens, mask = tokens[used], mask[used]
        if len(tokens):
            found.append(Calibration(tokens, mask, first))
            first += len(tokens)
    if not found:
        raise ConfigError("the calibration text holds no token: give at least one batch with a token")
    if len(found) == 1 and len(found[0].tokens) > 1:
        whole = found[0]
        return [Calibration(whole.tokens[i::2], whole.mask[i::2], i * len(whole.tokens)) for i in range(2)]
    return found


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers of a model by index.

    Raises:
        ConfigError: if there is none, or more than one stack of numbered modules holds Linears.
    """
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            stack = found.setdefault(".".join(parts[:at]), {})
            stack.setdefault(int(parts[at]), model.get_submodule(".".join(parts[: at + 1])))
    if len(found) > 1:
        raise ConfigError(f"the model has more than one stack of layers: {', '.join(found)}; a scan takes one decoder")
    if not found:
        children = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"{type(model).__name__} has no decoder layers: no Linear lies in a numbered list of modules "
            f"(its parts: {children or 'none'})"
        )
    (stack,) = found.values()
    return dict(sorted(stack.items()))


def draw_of(model: nn.Module, key: Key, batch: Calibration) -> AbstractContextManager[None]:
    """Noise of the installed hardware drawn by key and row ids inside; nothing where it draws none.

    (A mixture of experts has Linears that see some tokens only, which row ids do not allow.)
    """
    return noise_key(model, key, batch.rows()) if required(model).hardware.is_noisy else nullcontext()


@contextmanager
def in_force_on(installed: InstalledHardware, layers: Sequence[nn.Module]) -> Iterator[None]:
    """The hardware is in force inside these modules alone."""
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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no parameter gradients inside, and torch's settings known; all as before afterwards."""
    refuse_autocast("a scan", next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with own_torch_state(), mode.evaluation_mode(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def calibration_texts(task: Task) -> list[Worked]:
    """Training problems, each with a worked solution where the task knows one."""
    return [Worked(problem, task.solution(problem) or "") for problem in task.train()]


CHUNK_TOKENS = 256


def text_kl(clean: Tensor, perturbed: Tensor, mask: Tensor) -> list[float]:
    """KL sums (nats) over the tokens of each text, for logits [N, S, V] and a mask [N, S]."""
    kl = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    parts = []
    for p, q in zip(*(torch.split(z[mask], CHUNK_TOKENS) for z in (clean, perturbed)), strict=True):
        p, q = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
        parts.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    kl[mask] = torch.cat(parts)
    return [float(v) for v in kl.sum(1)]
