"""LoRA (arXiv:2106.09685): low-rank adapters over the installed base, through PEFT; nothing else is trained.

    y = hardware(x, W) + (alpha / rank) * B A x

- The base is computed by the hardware as ever (`Q(W)` once for the whole run, as it never changes). A and B are plain
  Linears in float32, also over a bfloat16 base: neither quantized nor noisy, in rollouts, training and evaluation.
- A is drawn by PEFT (`U(-1/sqrt(in), 1/sqrt(in))`) from the run's seed, B is zero: the first policy is the base.
- The reference policy is the base with its adapters disabled: no second model in memory.
- The adapters are put into the given model in place. It keeps its class, its config and its forward; names gain
  PEFT's `.base_layer` and `.lora_A.default`.
- Adapters are saved as PEFT saves them, and plain PEFT loads them onto the plain base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from roundoff.config import ConfigError, LoRA, nearest
from roundoff.hardware.inventory import plain_name
from roundoff.models.adapter_file import ADAPTER_CONFIG, check_complete, read_adapter
from roundoff.models.dropout import MARK, DropoutDraws, KeyedDropout
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_torch_state

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ADAPTER_CONFIG", "Adapters", "attach", "load_adapters"]


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, which is changed in place."""

    peft: PeftModel
    """PEFT's view of the model."""
    modules: tuple[str, ...]
    """Dotted names of the Linears that have one, as in the plain model."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone inside: the reference policy."""
        with self.peft.disable_adapter():
            yield

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT does, into an existing directory."""
        self.peft.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # a model card with every field left to fill in

    def merge(self) -> PreTrainedModel:
        """The plain model with `W + (alpha / rank) * B A` in place of W; the adapters are gone afterwards.

        Raises:
            ConfigError: if hardware is installed: it would go on with the quantized weights of before; or if an adapted
            weight is also that of another module, which would change with it.
        """
        from roundoff.hardware.install import installed

        if installed(self.peft) is not None:
            raise ConfigError("adapters are merged into a plain model: load it without hardware")
        _check_not_tied(self.peft, self.modules)
        merged: PreTrainedModel = self.peft.merge_and_unload()
        return merged


def attach(model: PreTrainedModel, lora: LoRA, key: Key) -> Adapters:
    """Fresh adapters on `model`, in place; afterwards they alone require gradients.

    Raises:
        ConfigError: if a target matches no Linear, or one whose weight is tied to another module's.
    """
    from peft import LoraConfig, get_peft_model

    targets = _check_targets(model, lora)
    _check_not_tied(model, _chosen(model, targets))
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank; any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with _peft_at_work():
        torch.default_generator.manual_seed(key.fold("lora").value)
        peft = get_peft_model(model, settings)
    return _finished(model, peft, lora.dropout)


def load_adapters(model: PreTrainedModel, directory: Path) -> Adapters:
    """Saved adapters on `model`, in place, for evaluation (nothing requires gradients).

    Raises:
        ConfigError: if PEFT cannot put them on this model, or the file's tensors are not exactly those that the
            adapter has on it.
    """
    from peft import PeftModel

    tensors = read_adapter(directory)
    try:
        with _peft_at_work():
            peft = PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f"the adapter in {directory} does not fit the model: {error}") from error
    check_complete(peft, tensors, directory)
    return _finished(model, peft, 0.0)


@contextmanager
def _peft_at_work() -> Iterator[None]:
    """The global generator of the CPU, from which PEFT draws A (also where it then reads it), is restored afterwards.

    PEFT 0.21 asks transformers 5.23 by a name that is going out of use; no user can do anything about that.
    """
    with own_torch_state(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _finished(model: PreTrainedModel, peft: PeftModel, dropout: float) -> Adapters:
    """Evaluation mode throughout (new modules begin in training mode), and dropout that can be replayed."""
    draws = DropoutDraws()
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        found.append(plain_name(name))
        if dropout:
            module.lora_dropout["default"] = KeyedDropout(dropout, plain_name(name), draws)
    if dropout:
        model.__dict__[MARK] = draws
    peft.eval()
    return Adapters(peft, tuple(found))


def _check_targets(model: PreTrainedModel, lora: LoRA) -> str | list[str]:
    """What PEFT is told to wrap; PEFT itself is silent about one of several targets that matches nothing."""
    if lora.targets == "all-linear":
        return "all-linear"
    if not lora.targets:
        raise ConfigError("lora.targets is empty, so nothing would be trained: name Linear layers or 'all-linear'")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ConfigError(
                f"lora.targets names {target!r}, which no Linear of this model is called{nearest(target, kinds)} "
                f"(there are: {', '.join(kinds)})"
            )
    return list(lora.targets)


def _chosen(model: PreTrainedModel, targets: str | list[str]) -> tuple[str, ...]:
    """Names of the Linears that PEFT will wrap; with `all-linear` it leaves the output layer out."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return tuple(name for name in linears if model.get_submodule(name) is not output)
    return tuple(name for name in linears if any(name == t or name.endswith(f".{t}") for t in targets))


def _check_not_tied(model: nn.Module, adapted: Iterable[str]) -> None:
    """Refuse adapters on a weight that another module shares (tied embeddings).

    Merged, `W + B A` would be the weight of both modules, though the adapter was on one (huggingface/peft#2972).
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            users.setdefault(id(weight), []).append(plain_name(name))
    names = set(adapted)
    for sharing in users.values():
        several = sorted(set(sharing))
        tied = names & set(several)
        if tied and len(several) > 1:
            name = sorted(tied)[0]
            others = ", ".join(other for other in several if other != name)
            raise ConfigError(
                f"lora.targets names {name!r}, whose weight is tied to that of {others}: merging or exporting would "
                "change both; leave it out, or untie the model first (tie_word_embeddings = false)"
            )
