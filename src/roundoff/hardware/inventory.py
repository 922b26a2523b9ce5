"""Which modules of a model the hardware computes, and why it skips the others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from roundoff.config import ConfigError, Hardware, pattern_matches
from roundoff.hardware import experts
from roundoff.hardware.linear import HardwareLinear


@dataclass(frozen=True, slots=True)
class Entry:
    """One module on the installed hardware."""

    name: str
    """Dotted name in the model."""
    layer: int | None
    """Index of its decoder layer, from 0; None if it is not in a layer."""
    weight: str | None
    """Format of the weight; None means high precision."""
    activation: str | None
    """Format of the input; None means high precision."""
    noise: float
    """Relative standard deviation of the noise on its products (fraction)."""
    deadzone: float = 0.0
    """Threshold of the input's deadzone relative to the largest magnitude of the token (fraction)."""
    faults: tuple[str, ...] = ()
    """Kinds of the faults of the unit that computes it."""
    gradient: str | None = None
    """Format of the gradient of its output; None means high precision."""
    accumulator: str | None = None
    """How its products are summed, in words; None means float32."""
    errors: tuple[str, ...] = ()
    """Errors of its products besides the published noise, in words."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """One module with weights that the hardware does not compute."""

    name: str
    """Dotted name in the model."""
    reason: str
    """Why it is skipped, for the report."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A Linear, or the experts of one layer, that the settings do not exclude."""

    name: str
    """Dotted name in the model."""
    plain_name: str
    """The same without the parts that PEFT adds."""
    layer: int | None
    """Index of its decoder layer, from 0; None if it is not in a layer."""
    module: nn.Module
    """The module itself."""


def plain_name(name: str) -> str:
    """A module's dotted name without the parts that PEFT adds when it wraps the model."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def layer_index(name: str) -> int | None:
    """Index of the decoder layer in a dotted name: the first part that is a number; None if there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def within_layer(name: str) -> str:
    """The part of a dotted name after its layer index, such as `mlp.up_proj`."""
    match = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return match.group(1) if match else name


def where(entries: Iterable[Entry]) -> str:
    """Describe which modules these are, as in `layers 0-5: mlp.down_proj, mlp.up_proj`.

    Layers of which other modules are meant are told apart by semicolons.
    """
    names: dict[int | None, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.layer, []).append(within_layer(plain_name(entry.name)))
    layers: dict[tuple[str, ...], list[int]] = {}
    for layer, inside in names.items():
        layers.setdefault(tuple(dict.fromkeys(inside)), []).extend([] if layer is None else [layer])
    return "; ".join(_numbered(found) + ", ".join(inside) for inside, found in layers.items())


def _numbered(layers: list[int]) -> str:
    """Indices as in `layers 0-5: `; empty if there are none."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {shown}: " if layers else ""


def described(entry: Entry) -> str:
    """Describe what the hardware does to a module, as in `weight mxfp4, activation mxfp4, noise 0.05`."""
    parts = [f"weight {entry.weight or 'high precision'}, activation {entry.activation or 'high precision'}"]
    if entry.gradient:
        parts.append(f"gradient {entry.gradient}")
    if entry.accumulator:
        parts.append(entry.accumulator)
    if entry.noise:
        parts.append(f"noise {entry.noise:g}")
    parts += entry.errors
    if entry.deadzone:
        parts.append(f"deadzone {entry.deadzone:g}")
    parts += [f"fault {kind}" for kind in entry.faults]
    return ", ".join(parts)


def exclusion(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches the dotted name or a part of it; None if none does."""
    parts = (name, *name.split("."))
    return next((p for p in patterns if any(fnmatchcase(part, p) for part in parts)), None)


def candidate(name: str, module: nn.Module) -> Candidate:
    """A module as a candidate."""
    plain = plain_name(name)
    return Candidate(name, plain, layer_index(plain), module)


def is_adapter(name: str) -> bool:
    """Whether a dotted name is that of a part of a LoRA adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def find_adapters(model: nn.Module, hardware: Hardware) -> list[Candidate]:
    """The Linears of adapters that the settings do not exclude, over Linears that are on hardware."""
    on_hardware = {name for name, module in model.named_modules() if isinstance(module, HardwareLinear)}
    return [
        candidate(name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and is_adapter(name)
        and name.rpartition(".lora_")[0] + ".base_layer" in on_hardware
        and exclusion(plain_name(name), hardware.exclude) is None
    ]


def kept_layers(keep: tuple[int, ...] | str, layers: Iterable[int | None]) -> tuple[int, ...]:
    """The layers that `precision.keep` names, of which negative ones count from the last; `layers` are the model's.

    Raises:
        ConfigError: if it names a scan that has not been made.
    """
    if isinstance(keep, str):
        raise ConfigError(
            f"hardware.precision.keep = {keep!r} must be resolved by a scan before install: pass the layer indices"
        )
    count = 1 + max((layer for layer in layers if layer is not None), default=-1)
    return tuple(layer + count if -count <= layer < 0 else layer for layer in keep)


def find_linears(model: nn.Module, hardware: Hardware) -> tuple[list[Candidate], list[Skipped]]:
    """The Linears and experts that the hardware can compute, and the other modules that have matrices.

    Raises:
        ConfigError: if the model already has hardware, if no Linear is left, if a weight is of a dtype or kind that
            cannot be computed, or if a setting names a layer or module that does not exist.
    """
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        if isinstance(module, HardwareLinear) or experts.STATE in module.__dict__:
            raise ConfigError(f"hardware is installed on {name} already: uninstall it before installing again")
        reason = _skip_reason(name, module, hardware)
        if reason is None:
            candidates.append(candidate(name, module))
        elif reason:
            skipped.append(Skipped(name, reason))
    if not candidates:
        names = [s.name for s in skipped]
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        raise ConfigError(
            f"hardware.exclude = {list(hardware.exclude)} leaves no Linear to compute; modules of this model: "
            f"{shown or 'none with weights'}"
        )
    _check_layers(candidates, hardware)
    return candidates, skipped


def _skip_reason(name: str, module: nn.Module, hardware: Hardware) -> str | None:
    """Why a module is skipped: None if it is not, and "" if it has no matrix and so is not part of the report."""
    matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    if not matrices and not isinstance(module, nn.Linear):
        return ""
    pattern = exclusion(plain_name(name), hardware.exclude)
    if pattern is not None:
        return f"excluded by hardware.exclude ({pattern!r})"
    if is_adapter(name) and not hardware.lora:
        return "LoRA adapter: stays in high precision"
    if type(module) is nn.Linear or experts.is_experts(module):
        missing = experts.unsupported(module) if experts.is_experts(module) else None
        if missing is not None:
            return (
                f"{type(module).__name__} has {missing}, which is not simulated: left in high precision, without noise"
            )
        if matrices[0].dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"{name} is of {matrices[0].dtype}: hardware takes float32 or bfloat16 models")
        if hardware.quantizes_weights and matrices[0].is_inference():
            raise ConfigError(
                f"{name} was made in torch.inference_mode, which hides changes to it, so that its Q(W) could become "
                "stale unnoticed: load the model outside of inference mode (evaluating inside is fine)"
            )
        return None
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of Linear that overrides forward"
    return f"{type(module).__name__} is not a Linear: left in high precision, without noise"


def check_rules(hardware: Hardware, names: Iterable[str]) -> None:
    """Refuse a pattern of `hardware.rules` that matches none of these modules.

    Raises:
        ConfigError: naming the rule and the pattern.
    """
    names = list(names)
    for number, one in enumerate(hardware.rules):
        for pattern in one.match:
            if not any(pattern_matches(pattern, name) for name in names):
                raise ConfigError(
                    f"hardware.rules.{number}.match names {pattern!r}, which matches no module on this hardware: its "
                    f"modules have names like {names[-1]!r}"
                )


def _check_layers(candidates: list[Candidate], hardware: Hardware) -> None:
    """Refuse settings that name a layer or a module without a Linear to compute.

    Raises:
        ConfigError: naming the setting; also if `precision.keep` is not yet resolved, or the deadzone has no layers.
    """
    layers = sorted({f.layer for f in candidates if f.layer is not None})
    span = f"layers with a Linear to compute: {layers[0]} to {layers[-1]}" if layers else "no numbered layers"
    keep = kept_layers(hardware.precision.keep, layers)
    named = [("hardware.precision.keep", layer) for layer in keep]
    if hardware.deadzone is not None:
        named += [("hardware.deadzone.layers", layer) for layer in hardware.deadzone.layers]
        if not hardware.deadzone.layers:
            raise ConfigError("hardware.deadzone.layers is empty, so the deadzone would do nothing: name its layers")
    named += [(f"hardware.faults.{i}.layer", fault.layer) for i, fault in enumerate(hardware.faults)]
    for path, layer in named:
        if layer not in layers:
            raise ConfigError(f"{path} names layer {layer}, which does not exist ({span})")
    for i, fault in enumerate(hardware.faults):
        names = [within_layer(f.plain_name) for f in candidates if f.layer == fault.layer]
        if fault.module is not None and fault.module not in names:
            raise ConfigError(
                f"hardware.faults.{i}.module names {fault.module!r}, which layer {fault.layer} does not have "
                f"(it has: {', '.join(names)})"
            )
