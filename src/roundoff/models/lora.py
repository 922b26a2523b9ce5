"""LoRA (arXiv:2106.09685): low-rank adapters over the installed base, through PEFT; nothing else is trained.

    y = hardware(x, W) + (alpha / rank) * B A x

- The hardware computes the base as usual (`Q(W)` once for the entire run, since W never changes). A and B are plain
  Linears in float32, even on a bfloat16 base. They are neither quantized nor noisy, unless `hardware.lora` is true.
- PEFT draws A (`U(-1/sqrt(in), 1/sqrt(in))`) from the run's seed, and B is zero: the first policy is the base.
- The reference policy is the base with its adapters disabled, so there is no second model in memory.
- The adapters are added to the model in place. It keeps its class, its config and its forward; parameter names gain
  PEFT's `.base_layer` and `.lora_A.default`.
- Adapters are saved as PEFT saves them, and plain PEFT loads them onto the plain base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from roundoff.config import ConfigError, LoRA, nearest
from roundoff.hardware import install_adapters, installed
from roundoff.hardware.inventory import plain_name
from roundoff.models.adapter_file import (
    ADAPTER_CONFIG,
    check_base,
    check_complete,
    drop_copies,
    read_adapter,
    write_record,
)
from roundoff.models.keyed_dropout import MARK, DropoutDraws, KeyedDropout
from roundoff.models.weights import plain_parameter, shared_weights
from roundoff.numerics.rng import Key
from roundoff.numerics.torch_state import own_defaults

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ADAPTER_CONFIG", "Adapters", "attach", "load_adapters"]


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, which attaching them changed in place."""

    peft: PeftModel
    """PEFT's view of the model."""
    modules: tuple[str, ...]
    """Dotted names, as in the plain model, of the Linears that have an adapter."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block, the model is its base alone: the reference policy."""
        with self.peft.disable_adapter():
            yield

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into an existing directory, as PEFT does."""
        self.peft.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # a model card with every field left to fill in
        write_record(directory, self.peft.get_base_model())  # type: ignore[arg-type]

    def merge(self) -> PreTrainedModel:
        """The plain model with `W + (alpha / rank) * B A` in place of W; the adapters are gone afterwards.

        Each sum is rounded once to the model's dtype. In bfloat16, an adapter's contribution is lost where it is below
        about 1/500 of the weight.

        Raises:
            ConfigError: if hardware is installed (it would keep using the old quantized weights), if a merged weight
                is shared with another module, which would change with it, or if a sum is not finite.
        """
        if installed(self.peft) is not None:
            raise ConfigError("adapters are merged into a plain model: load it without hardware")
        model = self.peft.get_base_model()
        if (shared := _shared_with(model)) is not None:
            raise ConfigError(
                f"the adapter of {shared[0]} cannot be merged: the weight is shared with {shared[1]} (tied "
                "embeddings), which would change with it; keep the adapter apart, or train one without that target"
            )
        with own_defaults():
            merged: PreTrainedModel = self.peft.merge_and_unload()
        for name, parameter in merged.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ConfigError(f"{name} is not finite after its adapter was merged into it")
        return merged


def attach(model: PreTrainedModel, lora: LoRA, key: Key) -> Adapters:
    """Add fresh adapters to `model` in place; afterwards only they require gradients.

    Raises:
        ConfigError: if a target matches no Linear, or one whose weight is shared with another module, or if the model
            already has adapters.
    """
    from peft import LoraConfig, get_peft_model

    _check_none(model)
    targets = _check_targets(model, lora)
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
    if (shared := _shared_with(model)) is not None:
        peft.base_model.unload()  # type: ignore[operator]
        raise ConfigError(
            f"lora.targets includes {shared[0]}, whose weight is shared with {shared[1]} (tied embeddings): merging "
            "the adapter would change both, so leave it out of lora.targets"
        )
    return _finished(model, peft, lora.dropout)


def load_adapters(model: PreTrainedModel, directory: Path) -> Adapters:
    """Add saved adapters to `model` in place, for evaluation: nothing requires gradients.

    Raises:
        ConfigError: if the adapter is not plain LoRA, does not fit the model tensor by tensor, or records another
            base. The model is then unchanged.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    _check_none(model)
    adapter = read_adapter(directory)
    check_base(adapter, model)
    config = adapter.config
    config.base_model_name_or_path, config.init_lora_weights, config.inference_mode = model.name_or_path, True, True
    try:
        with _peft_at_work():
            peft: PeftModel = get_peft_model(model, config)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise adapter.error(f"does not fit the model: {error}") from error
    try:
        drop_copies(adapter, dict(peft.named_parameters(remove_duplicate=False)))
        check_complete(adapter, get_peft_model_state_dict(peft, save_embedding_layers=False))
        with own_defaults():
            set_peft_model_state_dict(peft, dict(adapter.tensors))
        for name, tensor in get_peft_model_state_dict(peft, save_embedding_layers=False).items():
            if not torch.equal(tensor.detach().cpu().double(), adapter.tensors[name].double()):
                raise adapter.error(f"does not fit the model: {name} would be rounded to {tensor.dtype}")
    except ConfigError:
        peft.base_model.unload()  # type: ignore[operator]
        raise
    peft.requires_grad_(False)
    return _finished(model, peft, 0.0)


def _check_none(model: PreTrainedModel) -> None:
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ConfigError("the model has adapters already: load it again, and put one adapter on it")


def _shared_with(model: nn.Module) -> tuple[str, str] | None:
    """A weight that merging would change although another module shares it, and that module's name for it."""
    changed = [f"{name}." for name, module in model.named_modules() if _is_changed(module)]
    for name, other in shared_weights(model).items():
        if name.startswith(tuple(changed)):
            return plain_parameter(name), plain_parameter(other)
    return None


def _is_changed(module: nn.Module) -> bool:
    """Whether merging changes the module: it has an adapter, or a trained copy (PEFT's `modules_to_save`)."""
    return hasattr(module, "lora_A") or hasattr(module, "modules_to_save")


@contextmanager
def _peft_at_work() -> Iterator[None]:
    """Restores the CPU's global generator afterwards, and torch's defaults.

    PEFT draws A from that generator, even when it then loads A from a file. PEFT 0.21 also uses a deprecated name of
    transformers 5.23; users can do nothing about that warning, so it is hidden.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), own_defaults():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _finished(model: PreTrainedModel, peft: PeftModel, dropout: float) -> Adapters:
    """Put all modules into evaluation mode (new ones start in training mode), with dropout that can be replayed.

    Adapters are put on the model's hardware if its settings say so (`hardware.lora`).

    Raises:
        ConfigError: if they say so and no adapter is over a Linear on hardware.
    """
    draws = DropoutDraws()
    adapted = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        adapted.append(plain_name(name))
        if dropout:
            module.lora_dropout["default"] = KeyedDropout(dropout, plain_name(name), draws)
    if dropout:
        model.__dict__[MARK] = draws
    peft.eval()
    if installed(model) is not None:
        install_adapters(model)
    return Adapters(peft, tuple(adapted))


def _check_targets(model: PreTrainedModel, lora: LoRA) -> str | list[str]:
    """The target modules for PEFT, which does not report a target that matches nothing if another one matches."""
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
