"""The files of a saved adapter, and whether they are whole: every tensor in its place, and no place without one.

PEFT loads what it can and only warns: renamed tensors leave the base model as it was, and its score then passes for the
adapter's (huggingface/peft#2699).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from roundoff.config import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
"""File that makes a directory an adapter of PEFT's."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names in its file.

    Raises:
        ConfigError: if it is no LoRA adapter, has no safetensors file, or holds values that are not finite.
    """
    from safetensors.torch import load_file

    settings = read_adapter_config(directory)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"the adapter in {directory} is of type {kind}: only LORA adapters can be used")
    weights = directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        more = "; adapter_model.bin is a pickle file, which can run code when read: convert it" if pickled else ""
        raise ConfigError(f"the adapter in {directory} has no {ADAPTER_WEIGHTS}{more}")
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises kinds of its own
        raise ConfigError(f"{weights} cannot be read: {error}") from error
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ConfigError(f"the adapter in {directory} holds NaN or Inf: {_shown(broken)}")
    return tensors


def read_adapter_config(directory: Path) -> Mapping[str, Any]:
    """The settings of an adapter.

    Raises:
        ConfigError: if there are none, or they are not JSON.
    """
    path = directory / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory} is no adapter: it holds no {ADAPTER_CONFIG}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds no settings")
    return found


def check_complete(peft: PeftModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Check that the file's tensors are exactly those that the adapter has on this model, in name and shape.

    Raises:
        ConfigError: naming what is missing, left over, or of another shape.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    missing, left = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    other = sorted(name for name in set(own) & set(tensors) if own[name].shape != tensors[name].shape)
    said = [
        f"{what}: {_shown(names)}"
        for what, names in (
            ("tensors that the adapter needs on this model are missing", missing),
            ("tensors that this model has no place for", left),
            ("tensors of another shape", other),
        )
        if names
    ]
    if said:
        raise ConfigError(f"the adapter in {directory} does not fit the model; {'; '.join(said)}")


def _shown(names: Iterable[str]) -> str:
    """The first few names."""
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more
