"""Which attention layers of a model are computed on hardware, and what each of them gets from the settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from roundoff.config import ConfigError, Hardware
from roundoff.hardware.attention import AttentionState
from roundoff.hardware.attention_formats import AttentionFormats
from roundoff.hardware.error_models import Scale
from roundoff.hardware.inventory import exclusion, layer_index, plain_name
from roundoff.hardware.runtime import Runtime


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What the hardware of a phase does to one attention layer; nothing by default."""

    name: str
    """Dotted name in the model."""
    forward_std: float = 0.0
    """Relative standard deviation of the noise on QK^T and PV (fraction)."""
    backward_std: float = 0.0
    """The same on the four products of the backward pass (fraction)."""
    scale: Scale = "output"
    """What the noise is relative to."""
    cache: str | None = None
    """Format of cached keys and values; None means high precision."""
    operands: str | None = None
    """Format of the operands of QK^T and PV; None means high precision."""

    def state(self, runtime: Runtime) -> AttentionState:
        """The state of the layer."""
        formats = AttentionFormats(self.cache, self.operands)
        return AttentionState(
            plain_name(self.name), runtime, self.forward_std, self.backward_std, self.scale, formats=formats
        )

    @property
    def described(self) -> str:
        """What happens in the layer, as in `noise 0.05 on QK^T and PV, cache fp8_e4m3`; empty if nothing does."""
        std = max(self.forward_std, self.backward_std)
        scale = "" if self.scale == "output" else f" relative to the {self.scale}"
        parts = [
            f"noise {std:g}{scale} on QK^T and PV" if std else "",
            f"cache {self.cache}" if self.cache else "",
            f"operands {self.operands}" if self.operands else "",
        ]
        return ", ".join(part for part in parts if part)


def attention_plans(model: nn.Module, hardware: Hardware, keep: Collection[int]) -> dict[str, AttentionPlan]:
    """What happens in each attention layer, by its dotted name; empty if the settings leave attention as it is.

    An excluded layer has nothing, and one of the layers to `keep` has noise alone. Rules whose noise reaches no
    attention layer leave attention as it is.

    Raises:
        ConfigError: as `_attention_modules` does.
    """
    plans = {name: _plan(name, hardware, keep) for name, _ in _attention_modules(model, hardware)}
    return {} if hardware.rules and not any(plan.described for plan in plans.values()) else plans


def check_attention_rules(model: nn.Module, hardware: Hardware) -> None:
    """Refuse a rule that gives formats to attention and matches no attention layer.

    Raises:
        ConfigError: naming the rule and the setting.
    """
    if not any(one.formats_of_attention for one in hardware.rules):
        return
    names = [plain_name(name) for name, _ in _attention_modules(model, hardware)]
    for number, one in enumerate(hardware.rules):
        if one.formats_of_attention and not any(map(one.matches, names)):
            raise ConfigError(
                f"hardware.rules.{number}.{one.formats_of_attention[0]} does nothing: {list(one.match)} matches no "
                f"attention layer (their names are like {names[-1]!r})"
            )


def _plan(name: str, hardware: Hardware, keep: Collection[int]) -> AttentionPlan:
    plain = plain_name(name)
    if exclusion(plain, hardware.exclude):
        return AttentionPlan(name)
    here = hardware.at(plain)
    noise, precision = here.matmul_noise, here.precision
    forward, backward = (noise.attention_std if on else 0.0 for on in (noise.forward, noise.backward))
    formats = (None, None) if layer_index(plain) in keep else (precision.kv_cache, precision.attention)
    return AttentionPlan(name, forward, backward, noise.scale, *formats)


def _attention_modules(model: nn.Module, hardware: Hardware) -> list[tuple[str, nn.Module]]:
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


def _parts(hardware: Hardware) -> tuple[bool, dict[str, str]]:
    """Whether there is noise in attention, and the formats in it by the setting's name, in any of the modules."""
    variants = hardware.variants()
    noisy = any(variant.matmul_noise.attention_std for variant in variants)
    formats = {
        name: fmt
        for name in ("kv_cache", "attention")
        for v in variants
        if (fmt := getattr(v.precision, name)) is not None
    }
    return noisy, formats


def _settings(hardware: Hardware) -> str:
    """The settings that concern attention, as text."""
    noisy, formats = _parts(hardware)
    parts = ["hardware.matmul_noise.attention = true"] if noisy else []
    return " and ".join(parts + [f"hardware.precision.{name} = {fmt!r}" for name, fmt in formats.items()])


def _without(hardware: Hardware) -> str:
    """What to set instead."""
    noisy, formats = _parts(hardware)
    parts = ["set hardware.matmul_noise.attention = false"] if noisy else []
    names = [f"hardware.precision.{name}" for name in formats]
    return ", and ".join(parts + ([f"leave out {' and '.join(names)}"] if names else []))
