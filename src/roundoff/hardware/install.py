"""Install simulated hardware on a model, and uninstall it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from roundoff.config import PHASES, ConfigError, Fault, Hardware, MatmulNoise, Phase, first_line
from roundoff.hardware import attention, experts
from roundoff.hardware.faults import install_fault
from roundoff.hardware.gradients import GradientArithmetic
from roundoff.hardware.installed import MARK, InstalledHardware, installed, nonfinite_weights, required
from roundoff.hardware.inventory import (
    Candidate,
    Entry,
    Skipped,
    attention_layers,
    check_rules,
    find_linears,
    kept_layers,
    layer_index,
    plain_name,
    within_layer,
)
from roundoff.hardware.linear import LINEAR_STATE, HardwareLinear, LinearState
from roundoff.hardware.paths import check_paths, check_range
from roundoff.hardware.phases import STATES, ConfigSwitch, PhaseHardware, put_states, take_states
from roundoff.hardware.quantized_weight import QuantizedWeight
from roundoff.hardware.runtime import Runtime
from roundoff.numerics.rng import Key


def install(model: nn.Module, hardware: Hardware, *, seed: int) -> InstalledHardware:
    """Install hardware on a model, in place; call this once, before sampling and training.

    The class of each Linear is swapped. Parameters, their names, the state dict, PEFT and optimizers work as before.
    Outside of `hardware_phase`, the hardware of training is in force.

    Args:
        model: the model; a PEFT wrapper is allowed.
        hardware: the settings.
        seed: seed of the draws outside of `noise_key`, and of the choice of the channels that faults break.

    Returns:
        A report of what was done to which module, which also holds the switch of the hardware.

    Raises:
        ConfigError: if the model already has hardware, if there is no module to compute, if a setting names a layer or
            module that does not exist, if `precision.keep` is not yet resolved, or if the model would be computed
            around the hardware.
    """
    if installed(model) is not None:
        raise ConfigError("hardware is installed on this model already: uninstall it before installing again")
    runtime = Runtime(Key.from_seed(seed).fold("hardware"))
    of_phase = {phase: hardware.of(phase) for phase in PHASES}
    surveys = {one: _survey(model, one) for one in dict.fromkeys(of_phase.values())}
    if not any(survey.covered for survey in surveys.values()) and not hardware.changes_nothing:
        raise ConfigError(
            "hardware.precision.keep keeps every layer in high precision, so the hardware would do nothing: "
            "keep fewer layers, or add noise"
        )
    phases = {phase: surveys[one].result for phase, one in of_phase.items()}
    by_phase = {phase: surveys[one] for phase, one in of_phase.items()}
    covered = {item.name: item for survey in surveys.values() for item in survey.covered}
    for item in covered.values():
        _attach(item, by_phase, runtime)
    switches = _switches(model, by_phase)
    _attach_attention(model, by_phase, switches, runtime)
    names = {item.plain_name for item in covered.values()}
    result = InstalledHardware(
        hardware=hardware,
        seed=seed,
        phases=phases,
        nonfinite=nonfinite_weights(model, names),
        model=model,
        runtime=runtime,
        switches=switches,
    )
    result.switch(True)
    model.__dict__[MARK] = result
    return result


def uninstall(model: nn.Module) -> None:
    """Remove the hardware, in place: the model computes in plain arithmetic again, with its current weights.

    Raises:
        ConfigError: if no hardware is installed.
    """
    hardware = required(model)
    hardware.switch(False)
    for module in hardware.model.modules():
        if isinstance(module, HardwareLinear):
            module.__class__ = _plain_class(type(module))
        take_states(module)
    del hardware.model.__dict__[MARK]


def _plain_class(cls: Any) -> Any:
    """The plain class for a Linear on hardware.

    If something derived a class of its own after `install` (parametrizations, FSDP), the result is that class over
    `nn.Linear`.
    """
    if cls is HardwareLinear:
        return nn.Linear
    if not issubclass(cls, HardwareLinear):
        return cls
    own = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__.replace("Hardware", ""), tuple(map(_plain_class, cls.__bases__)), own)


@dataclass(frozen=True, slots=True)
class _Plan:
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

    @property
    def does_something(self) -> bool:
        """Whether any setting changes the module's arithmetic."""
        e = self.entry
        return bool(e.weight or e.activation or e.gradient or e.noise or e.deadzone or e.faults)

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
            faults=tuple(install_fault(fault, out_features, key.fold(index)) for index, fault in self.faults),
            is_output=self.is_output,
        )


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the hardware of one phase, or of several that agree, will do to a model."""

    result: PhaseHardware
    """The report."""
    covered: tuple[Candidate, ...]
    """The Linears and experts of its entries."""
    plans: dict[str, _Plan]
    """What happens to each of them, by name."""
    attention: dict[str, MatmulNoise]
    """The noise of each attention layer, by name; empty if none of the settings concerns attention."""


def _survey(model: nn.Module, hardware: Hardware) -> _Survey:
    """Find out what the hardware of a phase does to each module, and check that it can be done.

    Raises:
        ConfigError: as in `install`.
    """
    candidates, skipped = find_linears(model, hardware)
    attended = attention_layers(model, hardware)
    check_rules(hardware, [*(item.plain_name for item in candidates), *map(plain_name, attended)])
    output = _output_embedding(model)
    keep = kept_layers(hardware.precision.keep, (item.layer for item in candidates))
    plans = {item.name: _plan(item, hardware, keep, is_output=item.module is output) for item in candidates}
    covered = [item for item in candidates if plans[item.name].does_something]
    idle = [item.name for item in candidates if not plans[item.name].does_something]
    skipped += [Skipped(name, "the settings change nothing here (precision.keep)") for name in idle]
    check_paths(model, covered, hardware)
    for item in covered:
        check_range(item, plans[item.name].entry.weight)
    noisy = [entry for entry in (_attention_entry(name, noise) for name, noise in attended.items()) if entry.noise]
    result = PhaseHardware(
        hardware=hardware,
        entries=tuple(plans[item.name].entry for item in covered),
        skipped=tuple(skipped),
        modules=tuple(item.module for item in covered),
        attention=tuple(noisy),
    )
    return _Survey(result, tuple(covered), plans, attended)


def _attention_entry(name: str, noise: MatmulNoise) -> Entry:
    return Entry(name, layer_index(plain_name(name)), None, None, noise.relative_std)


def _plan(item: Candidate, hardware: Hardware, keep: tuple[int, ...], *, is_output: bool) -> _Plan:
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
    entry = Entry(item.name, item.layer, weight, activation, noise.relative_std, deadzone, kinds, shown)
    return _Plan(entry, tuple(faults), noise, gradient, is_output)


def _attach(item: Candidate, surveys: Mapping[Phase, _Survey], runtime: Runtime) -> None:
    """Put one module on the hardware: its state in each phase."""
    module = item.module
    stored: dict[tuple[str, str | None], QuantizedWeight] = {}
    made: dict[int, Any] = {}

    def state(survey: _Survey, name: str, out_features: int) -> LinearState:
        plan = survey.plans.get(item.name)
        fmt = None if plan is None else plan.entry.weight
        weight = stored.setdefault((name, fmt), QuantizedWeight(name, runtime, fmt))
        if plan is None:  # the settings of the phase exclude it
            return LinearState(name, runtime, weight)
        return plan.state(name, out_features, runtime, weight)

    def stacked(survey: _Survey) -> experts.ExpertsState:
        linears: dict[str, list[LinearState]] = {}
        for projection in experts.PROJECTIONS:
            count, out_features, _ = getattr(module, projection).shape
            names = [f"{item.plain_name}.{expert}.{projection}" for expert in range(count)]
            linears[projection] = [state(survey, name, out_features) for name in names]
        return experts.ExpertsState(runtime, linears)

    if isinstance(module, nn.Linear):
        module.__class__ = HardwareLinear
        for survey in surveys.values():
            if id(survey) not in made:
                made[id(survey)] = state(survey, item.plain_name, module.out_features)
        attribute = LINEAR_STATE
    else:
        for survey in surveys.values():
            if id(survey) not in made:
                made[id(survey)] = stacked(survey)
        attribute = experts.STATE
    states = {phase: made[id(survey)] for phase, survey in surveys.items()}
    put_states(module, attribute, states, runtime.phase)


def _attach_attention(
    model: nn.Module, surveys: Mapping[Phase, _Survey], switches: tuple[ConfigSwitch, ...], runtime: Runtime
) -> None:
    """Give their states to attention layers with noise, and to all other modules that share a switched config."""
    switched = {id(switch.config) for switch in switches if switch.attribute == ATTENTION_SWITCH}
    for name, module in model.named_modules():
        if id(module.__dict__.get("config")) not in switched or STATES in module.__dict__:
            continue
        made: dict[int, attention.AttentionState] = {}
        for survey in surveys.values():
            noise = survey.attention.get(name, MatmulNoise())
            std = noise.relative_std
            made[id(survey)] = attention.AttentionState(
                plain_name(name), runtime, std if noise.forward else 0.0, std if noise.backward else 0.0
            )
        states = {phase: made[id(survey)] for phase, survey in surveys.items()}
        put_states(module, attention.STATE, states, runtime.phase)


ATTENTION_SWITCH, EXPERTS_SWITCH = "_attn_implementation", "_experts_implementation"
"""Attributes of a model config that select the computation of attention, and of experts."""


def _switches(model: nn.Module, surveys: Mapping[Phase, _Survey]) -> tuple[ConfigSwitch, ...]:
    """Give the model its own copies of the configs, and return the switches in those of the modules on hardware.

    The copies are needed because another model may share a config and must not be switched with this one. transformers
    selects the attention of all layers, and its mask, by one config, so all layers switch together. It selects the
    computation of experts by the config of each layer's experts module, so the modules on hardware get a config each
    and all others compute as before.
    """
    attended = [phase for phase, survey in surveys.items() if survey.attention]
    layers = [model.get_submodule(name) for phase in attended for name in surveys[phase].attention]
    stacked: dict[str, tuple[nn.Module, list[Phase]]] = {}
    for phase, survey in surveys.items():
        for item in survey.covered:
            if not isinstance(item.module, nn.Linear):
                stacked.setdefault(item.name, (item.module, []))[1].append(phase)
    if not layers and not stacked:
        return ()
    copies: dict[int, Any] = {}  # memo of deepcopy, so that nested configs stay nested and shared configs stay shared
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, ATTENTION_SWITCH):
            module.__dict__["config"] = copy.deepcopy(config, copies)
    switches = []
    if layers:
        attention.register()
        names = dict.fromkeys(attended, attention.NAME)
        for config in {id(layer.config): layer.config for layer in layers}.values():
            switches.append(ConfigSwitch(config, ATTENTION_SWITCH, getattr(config, ATTENTION_SWITCH), names))
    if stacked:
        experts.register()
    for module, phases in stacked.values():
        config = module.__dict__["config"] = copy.copy(module.config)
        names = dict.fromkeys(phases, experts.NAME)
        switches.append(ConfigSwitch(config, EXPERTS_SWITCH, getattr(config, EXPERTS_SWITCH), names))
    return tuple(switches)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None if the model does not name it."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
