"""Which attention layers of a model are computed on hardware, and what each of them gets from the settings."""

from __future__ import annotations

from torch import nn

from roundoff.config import ConfigError, Hardware
from roundoff.hardware.attention import AttentionState
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.hardware.draw import Runtime
from roundoff.hardware.inventory import exclusion, layer_index, plain_name


def attention_modules(model: nn.Module, hardware: Hardware) -> list[tuple[str, nn.Module]]:
    """The attention layers of a model, each with its dotted name; none if the settings leave attention as it is.

    Raises:
        ConfigError: if the settings concern attention, but the model bypasses transformers' interface or has attention
            sinks.
    """
    if not hardware.concerns_attention:
        return []
    modules = []
    supported = any(getattr(module, "_supports_attention_backend", False) for module in model.modules())
    for name, module in model.named_modules():
        has_products = hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
        if supported and has_products and "config" in module.__dict__:
            modules.append((name, module))
    if not modules:
        raise ConfigError(
            f"{_settings(hardware)}, but this model has no attention that goes through transformers' attention "
            f"interface: {_without(hardware)}"
        )
    for name, module in modules:
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            raise ConfigError(
                f"{_settings(hardware)}, but {name} has attention sinks, which attention on hardware does not support: "
                f"{_without(hardware)}"
            )
    return modules


def _settings(hardware: Hardware) -> str:
    """The settings that concern attention, as text."""
    noise, precision = hardware.matmul_noise, hardware.precision
    parts = ["hardware.matmul_noise.attention = true"] if noise.relative_std and noise.attention else []
    parts += [
        f"hardware.precision.{name} = {fmt!r}"
        for name, fmt in (("kv_cache", precision.kv_cache), ("attention", precision.attention))
        if fmt is not None
    ]
    return " and ".join(parts)


def _without(hardware: Hardware) -> str:
    """What to set instead."""
    noise, precision = hardware.matmul_noise, hardware.precision
    parts = ["set hardware.matmul_noise.attention = false"] if noise.relative_std and noise.attention else []
    names = [f"hardware.precision.{name}" for name in ("kv_cache", "attention") if getattr(precision, name) is not None]
    parts += [f"leave out {' and '.join(names)}"] if names else []
    return ", and ".join(parts)


def attention_state(name: str, hardware: Hardware, runtime: Runtime) -> AttentionState:
    """What the settings do to the attention layer with this dotted name: nothing if it is excluded.

    A layer of `precision.keep` has noise alone.
    """
    plain = plain_name(name)
    noise, precision = hardware.matmul_noise, hardware.precision
    if exclusion(plain, hardware.exclude):
        return AttentionState(plain, runtime, 0.0, 0.0)
    std = noise.relative_std if noise.attention else 0.0
    kept = layer_index(plain) in precision.keep
    formats = AttentionFormats() if kept else AttentionFormats(precision.kv_cache, precision.attention)
    forward, backward = (std if on else 0.0 for on in (noise.forward, noise.backward))
    return AttentionState(plain, runtime, forward, backward, formats)


def described(state: AttentionState) -> str:
    """What happens in a layer, as in `noise 0.05 on QK^T and PV, cache fp8_e4m3`; empty if nothing does."""
    std, formats = max(state.forward_std, state.backward_std), state.formats
    parts = [
        f"noise {std:g} on QK^T and PV" if std else "",
        f"cache {formats.cache}" if formats.cache else "",
        f"operands {formats.operands}" if formats.operands else "",
    ]
    return ", ".join(part for part in parts if part)
