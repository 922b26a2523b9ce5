"""Checks that a model directory's weights are complete, fit the architecture and are finite."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from roundoff.errors import RoundoffWarning
from roundoff.models.errors import ModelError

INDEX = "model.safetensors.index.json"
"""File that says which shard holds which tensor."""

_FORMER_BUFFERS = ("masked_bias", "inv_freq")
"""Names of constants that old versions of transformers saved with every layer."""


def check_files(directory: Path, name: str) -> None:
    """Check that every shard that the index lists is there. A single weights file makes the index irrelevant.

    Raises:
        ModelError: if the index cannot be read, or naming the shards that are missing.
    """
    path = directory / INDEX
    if not path.is_file() or (directory / "model.safetensors").is_file():  # transformers reads the single file first
        return
    try:
        shards = {str(shard) for shard in json.loads(path.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model {name!r}: {path} is no index of shards: {error!r}") from None
    if absent := sorted(shard for shard in shards if not (directory / shard).is_file()):
        raise ModelError(
            f"model {name!r}: {INDEX} lists {len(shards)} shards, but {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not in {directory}: copy the whole directory again"
        )


def check_weights(model: PreTrainedModel, info: dict[str, object], name: str) -> None:
    """Check that every weight of the model came from its files, and that no tensor of its layers was left over.

    Tensors of entire parts that the model lacks (the vision tower of a model loaded for text) give a warning.

    Args:
        model: as transformers has loaded it.
        info: the loading information that transformers returned with it.
        name: of the model, for messages.

    Raises:
        ModelError: naming tensors that are missing, unknown or of the wrong shape, or that hold NaN or infinity.
    """
    for key in ("missing_keys", "mismatched_keys", "error_msgs"):
        if problems := info.get(key):
            names = sorted(map(str, problems))  # type: ignore[call-overload]
            raise ModelError(f"model {name!r}: its weights do not fit its architecture ({key}: {few(names)})")
    unknown = sorted(map(str, info.get("unexpected_keys") or ()))  # type: ignore[call-overload]
    if inside := [key for key in unknown if _is_inside(model, key)]:
        raise ModelError(f"model {name!r}: its weights do not fit its architecture (unexpected_keys: {few(inside)})")
    if unknown := [key for key in unknown if key.rpartition(".")[2] not in _FORMER_BUFFERS]:
        warnings.warn(
            f"model {name!r}: its files hold tensors of parts that {type(model).__name__} does not have, which were "
            f"not read: {few(unknown)}",
            RoundoffWarning,
            stacklevel=3,
        )
    for part, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"model {name!r}: {part} holds NaN or infinity in {dtype}, so every result would be worthless"
            )


def _is_inside(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor belongs to a module that the model has, or to one more layer of a numbered list in it."""
    if key.rpartition(".")[2] in _FORMER_BUFFERS:
        return False
    names = {name: module for name, module in model.named_modules() if name}
    parents = [".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)]
    return (bool(parents) and parents[-1] in names and parents[-1] != model.base_model_prefix) or any(
        isinstance(names.get(parent), nn.ModuleList) for parent in parents
    )


def few(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over names (those of the plain model) and bytes of all parameters except those of adapters."""
    named = model.named_parameters()
    return parameters_digest((n, p) for n, p in named if ".lora_" not in n and ".modules_to_save." not in n)


def parameters_digest(named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over the names (without what PEFT adds to them) and the bytes of parameters, in their order."""
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(plain_parameter(name).encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_parameter(name: str) -> str:
    """A parameter's name without what PEFT's wrapping adds to it."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Parameters that share memory with another one (tied embeddings): each one's name with the other's."""
    owners: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and parameter.device.type != "meta":
            owners.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(name)
    return {name: next(o for o in names if o != name) for names in owners.values() if len(names) > 1 for name in names}
