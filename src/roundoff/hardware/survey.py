"""What the hardware of a phase will do to each module of a model, found out before anything is changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from roundoff.config import Accumulator, ConfigError, Fault, Hardware, MatmulNoise, first_line
from roundoff.hardware.attention_modules import AttentionPlan, attention_plans, check_attention_rules
from roundoff.hardware.error_models import install_errors
from roundoff.hardware.faults import install_fault
from roundoff.hardware.gradients import GradientArithmetic
from roundoff.hardware.inventory import (
    Candidate,
    Entry,
    Skipped,
    candidate,
    check_rules,
    find_adapters,
    find_linears,
    kept_layers,
    plain_name,
    within_layer,
)
from roundoff.hardware.linear import LinearState
from roundoff.hardware.paths import check_paths, check_range
from roundoff.hardware.phases import PhaseHardware
from roundoff.hardware.quantized_weight import QuantizedWeight
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.accumulate import PartialSums


@dataclass(frozen=True, slots=True)
class Plan:
    """What the hardware will do to one Linear, or to the experts of one layer."""

    entry: Entry
    """The line of the report."""
    faults: tuple[tuple[int, Fault], ...]
    """The faults of its unit, each with its index in the settings."""
    noise: MatmulNoise
    """Settings of the noise on its products."""
    gradient: GradientArithmetic | None
    """How the operands of its backward products are stored."""
    is_output: bool
    """Whether this is the output embedding."""
    sums: PartialSums | None = None
    """How its products are summed; None means float32."""

    @property
    def does_something(self) -> bool:
        """Whether any setting changes the module's arithmetic."""
        e = self.entry
        changed = e.weight or e.activation or e.gradient or e.accumulator
        return bool(changed or e.noise or e.errors or e.deadzone or e.faults)

    def state(self, name: str, out_features: int, runtime: Runtime, stored: QuantizedWeight) -> LinearState:
        """The state of one weight matrix with this many output channels."""
        key = runtime.seed_key.fold("fault", name)
        std = self.noise.relative_std
        return LinearState(
            name,
            runtime,
            stored,
            activation_format=self.entry.activation,
            forward_std=std if self.noise.forward else 0.0,
            backward_std=std if self.noise.backward else 0.0,
            deadzone=self.entry.deadzone,
            gradient=self.gradient,
            sums=self.sums,
            errors=install_errors(self.noise, out_features, runtime.seed_key.fold("gain", name)),
            faults=tuple(install_fault(fault, out_features, key.fold(index)) for index, fault in self.faults),
            is_output=self.is_output,
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """What the hardware of one phase, or of several that agree, will do to a model."""

    result: PhaseHardware
    """The report."""
    covered: tuple[Candidate, ...]
    """The Linears and experts of its entries."""
    plans: dict[str, Plan]
    """What happens to each of them, by name."""
    attention: dict[str, AttentionPlan]
    """What happens in each attention layer, by name; empty if none of the settings concerns attention."""

    @property
    def does_something(self) -> bool:
        """Whether any module is computed otherwise than in the plain model."""
        return bool(self.covered or self.result.attention)


def survey(model: nn.Module, hardware: Hardware) -> Survey:
    """Find out what the hardware of a phase does to each module, and check that it can be done.

    Raises:
        ConfigError: as in `install`.
    """
    candidates, skipped = find_linears(model, hardware)
    keep = kept_layers(hardware.precision.keep, (item.layer for item in candidates))
    attended = attention_plans(model, hardware, keep)
    check_attention_rules(model, hardware)
    check_rules(hardware, [*(item.plain_name for item in candidates), *map(plain_name, attended)])
    return _survey(model, hardware, candidates, skipped, keep, attended)


def survey_adapters(model: nn.Module, before: PhaseHardware) -> Survey:
    """The same for adapters that came after the hardware, added to what it covers already.

    Raises:
        ConfigError: if the settings concern adapters and there are none.
    """
    hardware = before.hardware
    candidates = find_adapters(model, hardware) if hardware.lora else []
    if hardware.lora and not candidates:
        raise ConfigError("hardware.lora = true does nothing without adapters on the hardware's Linears")
    layers = [candidate(name, module).layer for name, module in model.named_modules()]
    found = _survey(model, hardware, candidates, [], kept_layers(hardware.precision.keep, layers), {})
    result = dataclasses.replace(
        before,
        entries=(*before.entries, *found.result.entries),
        modules=(*before.modules, *found.result.modules),
    )
    return dataclasses.replace(found, result=result)


def _survey(
    model: nn.Module,
    hardware: Hardware,
    candidates: list[Candidate],
    skipped: list[Skipped],
    keep: tuple[int, ...],
    attended: dict[str, AttentionPlan],
) -> Survey:
    output = _output_embedding(model)
    plans = {item.name: _plan(item, hardware, keep, is_output=item.module is output) for item in candidates}
    covered = [item for item in candidates if plans[item.name].does_something]
    idle = [item for item in candidates if not plans[item.name].does_something]
    skipped += [Skipped(item.name, _why_idle(item, hardware, keep, attends=bool(attended))) for item in idle]
    check_paths(model, covered, hardware)
    for item in covered:
        check_range(item, plans[item.name].entry.weight)
    result = PhaseHardware(
        hardware=hardware,
        entries=tuple(plans[item.name].entry for item in covered),
        skipped=tuple(skipped),
        modules=tuple(item.module for item in covered),
        attention={name: words for name, plan in attended.items() if (words := plan.described)},
    )
    return Survey(result, tuple(covered), plans, attended)


def _why_idle(item: Candidate, hardware: Hardware, keep: tuple[int, ...], *, attends: bool) -> str:
    """Why a module that is not excluded is computed as in the plain model."""
    if hardware.changes_nothing:
        return "this phase is in plain arithmetic"
    if item.layer in keep:
        return "the settings change nothing here (precision.keep)"
    matching = [number for number, one in enumerate(hardware.rules) if one.matches(item.plain_name)]
    if matching:
        return f"the settings change nothing here (rules.{matching[-1]})"
    return "the settings concern attention alone" if attends else "the settings concern other modules"


def _plan(item: Candidate, hardware: Hardware, keep: tuple[int, ...], *, is_output: bool) -> Plan:
    """Derive from the settings what happens to one module.

    Raises:
        ConfigError: if a fault would do nothing, or inverts a bit that bfloat16 does not have.
    """
    try:
        here = hardware.at(item.plain_name)
    except ValidationError as error:
        raise ConfigError(f"hardware.rules: of those that match {item.name}, {first_line(error)}") from None
    precision, noise, zone = here.precision, here.matmul_noise, here.deadzone
    kept = item.layer is not None and item.layer in keep
    weight, activation = (None, None) if kept else (precision.weight, precision.activation)
    gradient = None
    if precision.gradient is not None and not kept:
        gradient = GradientArithmetic(
            precision.gradient, precision.gradient_rounding == "stochastic", precision.hadamard == "dw"
        )
    deadzone = zone.threshold if zone is not None and (not zone.layers or item.layer in zone.layers) else 0.0
    faults = []
    for index, fault in enumerate(hardware.faults):
        if fault.layer != item.layer or fault.module not in (None, within_layer(item.plain_name)):
            continue
        if fault.kind == "bitflip" and fault.bit < 16 and next(item.module.parameters()).dtype is torch.bfloat16:
            raise ConfigError(
                f"hardware.faults.{index}.bit must be 16 or more on a bfloat16 model, which has no bit {fault.bit}"
            )
        if fault.share == 0:
            raise ConfigError(f"hardware.faults.{index}.share is 0, so the fault would do nothing")
        faults.append((index, fault))
    kinds = tuple(fault.kind for _, fault in faults)
    shown = None if gradient is None else gradient.format
    accumulator = None if kept else here.accumulator
    entry = Entry(
        item.name,
        item.layer,
        weight,
        activation,
        noise.relative_std,
        deadzone,
        kinds,
        shown,
        accumulator=None if accumulator is None else accumulator.in_words,
        errors=noise.other_errors,
    )
    return Plan(entry, tuple(faults), noise, gradient, is_output, _sums(accumulator))


def _sums(accumulator: Accumulator | None) -> PartialSums | None:
    """The arithmetic of an accumulator."""
    if accumulator is None:
        return None
    half = accumulator.bits == "fp16"
    return PartialSums(accumulator.mantissa, accumulator.promote, accumulator.group, accumulator.rounding, half)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None if the model does not name it."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
