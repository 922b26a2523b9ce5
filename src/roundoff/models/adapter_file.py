"""Reads a saved adapter completely or refuses it: its settings, its tensors, and the base it was trained on.

PEFT does not report tensors that are missing from an adapter's file or that do not belong there. It then computes with
the initial values of A and with B = 0, so that the base model is scored under the adapter's name
(huggingface/peft#2699). The functions below compare everything.

When roundoff saves an adapter, it writes a record into the header of `adapter_model.safetensors`, which other tools
ignore: the SHA-256 and dtype of the base, and the settings that cannot be recovered from the tensors.
"""

from __future__ import annotations

import json
import math
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from roundoff.config import ConfigError
from roundoff.errors import RoundoffWarning
from roundoff.models.weights import few, weights_digest
from roundoff.runs.record import SETTINGS

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
"""File whose presence makes a directory a PEFT adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RECORD = "roundoff"
"""Header entry of the adapter's file that holds the record."""

_PLAIN_SETTINGS = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying"),
    )
)
"""PEFT settings under which a layer, once its tensors are loaded, computes `hardware(x, W) + scale * B A x`. Any other
setting (DoRA, say, or one that this version of PEFT does not know) may make it compute something else."""
_INITIAL_VALUES = (True, False, "gaussian", "orthogonal", "eva", "lora_ga")
"""Values of `init_lora_weights` that do not change the base."""
_RECORDED = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The contents of an adapter directory, checked without reference to a model."""

    directory: Path
    config: LoraConfig
    tensors: dict[str, Shaped[Tensor, " ..."]]
    """Tensors by PEFT's names."""
    record: dict[str, Any] | None
    """What roundoff recorded when it saved the adapter; None if another tool saved it."""

    def error(self, what: str) -> ConfigError:
        """An error about this adapter."""
        return ConfigError(f"the adapter in {self.directory} {what}")


def read_adapter(directory: Path) -> AdapterFile:
    """The LoRA adapter in a directory.

    Raises:
        ConfigError: if a file is missing or cannot be read, or if the adapter is not LoRA, needs arithmetic other than
            plain LoRA's, is empty, or holds NaN or infinity.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError, safe_open

    where = f"the adapter in {directory}"
    settings = _settings(directory)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{where} must be a LoRA adapter, but peft_type of {ADAPTER_CONFIG} is {kind!r}")
    for name in sorted(settings.keys() - _PLAIN_SETTINGS):
        if settings[name]:
            raise ConfigError(
                f"{where} has {name} = {settings[name]!r} ({ADAPTER_CONFIG}): roundoff computes plain LoRA only"
            )
    if settings.get("init_lora_weights", True) not in _INITIAL_VALUES:
        raise ConfigError(
            f"{where} has init_lora_weights = {settings['init_lora_weights']!r} ({ADAPTER_CONFIG}), which changes the "
            "base: convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    if settings.get("bias", "none") != "none":
        raise ConfigError(f"{where} changes the base's biases (bias = {settings['bias']!r} in {ADAPTER_CONFIG})")
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ConfigError(f"{where} has no {ADAPTER_WEIGHTS}: weights are read only from safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        config = LoraConfig.from_pretrained(str(directory))
        record = json.loads(metadata[RECORD]) if RECORD in metadata else None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    for name, alpha in (("lora_alpha", settings.get("lora_alpha", 8)), *(settings.get("alpha_pattern") or {}).items()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < math.inf:
            raise ConfigError(
                f"{where} has {name} = {alpha!r} ({ADAPTER_CONFIG}): it must be a finite number other than 0"
            )
    adapter = AdapterFile(directory, config, tensors, record)
    _check_tensors(adapter)
    _check_record(adapter, settings)
    return adapter


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise ConfigError(f"{directory} is no adapter: it has no {ADAPTER_CONFIG}")
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return settings


def _check_tensors(adapter: AdapterFile) -> None:
    if not adapter.tensors:
        raise adapter.error("is empty: its file holds no tensor")
    for name, tensor in adapter.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in _DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise adapter.error(f"holds {name} in {dtype}: it must be one of {kinds}")
        if not bool(torch.isfinite(tensor).all()):
            raise adapter.error(f"holds NaN or infinity in {name}, so every result would be worthless")
    if not any(bool(tensor.any()) for name, tensor in adapter.tensors.items() if _adds(name)):
        warnings.warn(
            f"the adapter in {adapter.directory} changes nothing (every B is 0): scores are those of its base",
            RoundoffWarning,
            stacklevel=4,
        )


def _adds(name: str) -> bool:
    """Whether this part of the adapter changes nothing when the tensor is zero (it is a B, not an A)."""
    return ".lora_A." not in name and ".lora_embedding_A" not in name


def _check_record(adapter: AdapterFile, settings: dict[str, Any]) -> None:
    """Compare `adapter_config.json` with the record written when the adapter was saved, and with the run's settings."""
    if adapter.record is not None:
        for name, recorded in adapter.record["settings"].items():
            if (value := _plain(settings.get(name))) != recorded:
                raise adapter.error(
                    f"has {name} = {value!r} in {ADAPTER_CONFIG}, but was saved with {recorded!r}: restore the old "
                    f"{ADAPTER_CONFIG}"
                )
    path = adapter.directory.resolve().parent / SETTINGS
    if adapter.directory.resolve().name != "adapter" or not path.is_file():
        return
    try:
        lora = tomllib.loads(path.read_text("utf-8"))["experiment"].get("lora")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if lora is None:
        raise adapter.error(f"is in the directory of a run without adapters ({path} has no table [experiment.lora])")
    for name, key in (("r", "rank"), ("lora_alpha", "alpha")):
        if key in lora and settings.get(name) != lora[key]:
            raise adapter.error(
                f"has {name} = {settings.get(name)!r}, but its run has lora.{key} = {lora[key]} ({path})"
            )


def check_base(adapter: AdapterFile, model: PreTrainedModel) -> None:
    """Check that the plain model, with or without hardware, is the one that the adapter was trained on.

    Only an adapter that roundoff saved records its base. For an adapter from another tool nothing is checked here.

    Raises:
        ConfigError: if its weights or their dtype differ.
    """
    if adapter.record is None:
        return
    trained, dtype = adapter.record["dtype"], str(model.dtype).removeprefix("torch.")
    if dtype != trained:
        raise adapter.error(f"was trained on a base in {trained}, but the model is in {dtype}: set profile.dtype")
    if adapter.record["base"] != weights_digest(model):
        raise adapter.error(
            f"was trained on weights other than those of {model.name_or_path!r}: name the model of its run"
        )


def check_complete(adapter: AdapterFile, expected: dict[str, Shaped[Tensor, " ..."]]) -> None:
    """Check that the file holds exactly the tensors that its settings call for on this model.

    Raises:
        ConfigError: naming tensors that are missing, superfluous, or of the wrong shape.
    """
    missing, extra = sorted(expected.keys() - adapter.tensors), sorted(adapter.tensors.keys() - expected)
    if missing or extra:
        parts = [f"lacks {few(missing)}"] if missing else []
        parts += [f"holds {few(extra)}, which this model and {ADAPTER_CONFIG} have no place for"] if extra else []
        raise adapter.error(" and ".join(parts))
    for name, tensor in expected.items():
        if tensor.shape != adapter.tensors[name].shape:
            raise adapter.error(
                f"holds {name} of shape {list(adapter.tensors[name].shape)}, but on this model, at the rank in "
                f"{ADAPTER_CONFIG}, it must be {list(tensor.shape)}"
            )


def drop_copies(adapter: AdapterFile, parameters: Mapping[str, Shaped[Tensor, " ..."]]) -> None:
    """Remove copies of the base's own weights, which PEFT saves for adapted embeddings and output layers.

    Raises:
        ConfigError: if such a copy differs from the base: the adapter then belongs to another base.
    """
    for name in adapter.tensors.keys() & {n for n in parameters if ".lora_" not in n and ".modules_to_save." not in n}:
        own, copy = parameters[name].detach().cpu(), adapter.tensors[name]
        if own.shape != copy.shape or not torch.equal(own, copy.to(own.dtype)):
            raise adapter.error(f"holds {name}, which differs from the base's own: it was trained on another base")
        del adapter.tensors[name]


def write_record(directory: Path, model: PreTrainedModel) -> None:
    """Add the record to an adapter of `model`; called right after PEFT has saved it.

    The header is written here because safetensors orders several entries differently from call to call, and equal
    adapters must be equal files.
    """
    settings = _settings(directory)
    record = {
        "base": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": {name: _plain(settings.get(name)) for name in _RECORDED},
    }
    path = directory / ADAPTER_WEIGHTS
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": {"format": "pt", RECORD: json.dumps(record)}}
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of eight bytes
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[end:])


def _plain(value: Any) -> Any:
    """A setting without the order of its names, which is arbitrary because PEFT writes sets."""
    return sorted(value) if isinstance(value, list) else value
