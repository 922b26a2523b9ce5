"""Hardware in words, on one line: what each phase computes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from roundoff.config.phases import PHASES, Hardware


def hardware_in_words(hardware: Hardware) -> str:
    """What changes the arithmetic of the forward pass, in one line; phases that differ are named."""
    phases: dict[str, list[str]] = {}
    for phase in PHASES:
        phases.setdefault(_of_one(hardware.of(phase)), []).append(phase)
    if len(phases) == 1:
        return next(iter(phases))
    return "; ".join(f"{' and '.join(names)}: {words}" for words, names in phases.items())


def _of_one(hardware: Hardware) -> str:
    if hardware.changes_nothing:
        return "none (plain arithmetic)"
    precision, noise = hardware.precision, hardware.matmul_noise
    names = {"weight": "weight", "activation": "activation", "kv_cache": "key-value cache", "attention": "attention"}
    parts = [f"{shown} {fmt}" for name, shown in names.items() if (fmt := getattr(precision, name))]
    keep = precision.keep if isinstance(precision.keep, str) else ", ".join(map(str, precision.keep))
    parts += [f"layers {keep} kept"] if keep else []
    parts += [f"matmul noise {noise.relative_std:.3g}"] if noise.relative_std and noise.forward else []
    parts += noise.other_errors if noise.forward else ()
    parts += [hardware.accumulator.in_words] if hardware.accumulator else []
    parts += [f"deadzone {hardware.deadzone.threshold:g}"] if hardware.deadzone else []
    parts += [f"fault {fault.kind} in layer {fault.layer}" for fault in hardware.faults]
    parts += rules_in_words(hardware)
    return ", ".join(parts) or "none in the forward pass"


def rules_in_words(hardware: Hardware) -> list[str]:
    """Each rule, such as `*.down_proj: weight mxfp8_e4m3`."""
    return [
        f"{', '.join(one.match)}: {_listed(one.model_dump(mode='json', exclude_none=True, exclude={'match'}))}"
        for one in hardware.rules
    ]


def phases_in_words(hardware: Hardware) -> list[str]:
    """What is different in each phase, such as `training: weight none`; nothing for phases that follow others."""
    changes = {phase: getattr(hardware, phase) for phase in PHASES}
    return [
        f"{phase}: {_listed(one.model_dump(mode='json', exclude_none=True))}"
        for phase, one in changes.items()
        if one is not None
    ]


def differences(one: Hardware, other: Hardware, names: tuple[str, str]) -> list[str]:
    """The settings in which two hardwares without phases differ, such as `precision.weight mxfp4 in A, none in B`."""

    def flat(hardware: Hardware) -> dict[str, str]:
        content = hardware.model_dump(mode="json")
        content["rules"] = "; ".join(rules_in_words(hardware))
        return {path: "none" if value in (None, [], "") else str(value) for path, value in flatten(content).items()}

    left, right = flat(one), flat(other)
    return [
        f"{path} {left.get(path, 'none')} {names[0]}, {right.get(path, 'none')} {names[1]}"
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat mapping `path.to.setting: value`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def _listed(content: dict[str, Any]) -> str:
    return " ".join(f"{path} {value}" for path, value in _flat(content))


def _flat(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, key)
        else:
            yield (key if above in ("", "precision") else f"{above}.{key}"), value
