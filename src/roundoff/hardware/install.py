"""Install simulated hardware on a model, and uninstall it."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from roundoff.config import PHASES, ConfigError, Hardware, Phase
from roundoff.hardware import attention, experts
from roundoff.hardware.attention_modules import AttentionPlan
from roundoff.hardware.installed import MARK, InstalledHardware, installed, nonfinite_weights, required
from roundoff.hardware.inventory import Candidate
from roundoff.hardware.linear import LINEAR_STATE, HardwareLinear, LinearState
from roundoff.hardware.phases import STATES, ConfigSwitch, put_states, take_states
from roundoff.hardware.quantized_weight import QuantizedWeight
from roundoff.hardware.runtime import Runtime
from roundoff.hardware.survey import Survey, survey, survey_adapters
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
    found = surveys(model, hardware)
    by_phase = {phase: found[hardware.of(phase)] for phase in PHASES}
    covered = _attach_all(by_phase, runtime)
    switches = _switches(model, by_phase)
    _attach_attention(model, by_phase, switches, runtime)
    result = InstalledHardware(
        hardware=hardware,
        seed=seed,
        phases={phase: found.result for phase, found in by_phase.items()},
        nonfinite=nonfinite_weights(model, {item.plain_name for item in covered}),
        model=model,
        runtime=runtime,
        switches=switches,
    )
    result.switch(True)
    model.__dict__[MARK] = result
    return result


def surveys(model: nn.Module, hardware: Hardware) -> dict[Hardware, Survey]:
    """What the hardware of each phase will do to a model, by the hardware; nothing is changed.

    Raises:
        ConfigError: as in `install`; it names the phase whose table holds the wrong setting.
    """
    found: dict[Hardware, Survey] = {}
    for phase in PHASES:
        one = hardware.of(phase)
        if one in found:
            continue
        try:
            found[one] = survey(model, one)
        except ConfigError as error:
            text = str(error)
            named = re.match(r"hardware\.(\w+)", text)
            where = hardware.written_in(phase, named[1]) if named else None
            if where is None:
                raise
            raise ConfigError(text.replace("hardware.", f"hardware.{where}.", 1)) from None
    if not any(one.does_something for one in found.values()) and not hardware.changes_nothing:
        raise ConfigError(
            "hardware.precision.keep keeps every layer in high precision, so the hardware would do nothing: "
            "keep fewer layers, or add noise"
        )
    return found


def install_adapters(model: nn.Module) -> None:
    """Put adapters that a model got after `install` on its hardware, in the phases in which `hardware.lora` says so.

    Raises:
        ConfigError: if the model has no hardware, if some phase should compute adapters and there are none, or if a
            setting cannot be applied to them.
    """
    hardware = required(model)
    surveys = {one: survey_adapters(hardware.model, one) for one in dict.fromkeys(hardware.phases.values())}
    by_phase = {phase: surveys[one] for phase, one in hardware.phases.items()}
    hardware.phases = {phase: found.result for phase, found in by_phase.items()}
    _attach_all(by_phase, hardware.runtime)


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


def _by_phase(surveys: Mapping[Phase, Survey], make: Callable[[Survey], Any]) -> dict[Phase, Any]:
    """What is made for each phase; phases that agree have it in common."""
    made: dict[int, Any] = {}
    for found in surveys.values():
        if id(found) not in made:
            made[id(found)] = make(found)
    return {phase: made[id(found)] for phase, found in surveys.items()}


def _attach_all(surveys: Mapping[Phase, Survey], runtime: Runtime) -> list[Candidate]:
    """Put every module that some phase covers on the hardware."""
    covered = {item.name: item for found in surveys.values() for item in found.covered}
    for item in covered.values():
        _attach(item, surveys, runtime)
    return list(covered.values())


def _attach(item: Candidate, surveys: Mapping[Phase, Survey], runtime: Runtime) -> None:
    """Put one module on the hardware: its state in each phase."""
    module = item.module
    stored: dict[tuple[str, str | None], QuantizedWeight] = {}

    def state(found: Survey, name: str, out_features: int) -> LinearState:
        plan = found.plans.get(item.name)
        fmt = None if plan is None else plan.entry.weight
        weight = stored.setdefault((name, fmt), QuantizedWeight(name, runtime, fmt))
        if plan is None:  # the settings of the phase exclude it
            return LinearState(name, runtime, weight)
        return plan.state(name, out_features, runtime, weight)

    def stacked(found: Survey) -> experts.ExpertsState:
        linears: dict[str, list[LinearState]] = {}
        for projection in experts.PROJECTIONS:
            count, out_features, _ = getattr(module, projection).shape
            names = [f"{item.plain_name}.{expert}.{projection}" for expert in range(count)]
            linears[projection] = [state(found, name, out_features) for name in names]
        return experts.ExpertsState(runtime, linears)

    if isinstance(module, nn.Linear):
        out_features = module.out_features
        module.__class__ = HardwareLinear
        states = _by_phase(surveys, lambda found: state(found, item.plain_name, out_features))
        put_states(module, LINEAR_STATE, states, runtime.phase)
    else:
        put_states(module, experts.STATE, _by_phase(surveys, stacked), runtime.phase)


def _attach_attention(
    model: nn.Module, surveys: Mapping[Phase, Survey], switches: tuple[ConfigSwitch, ...], runtime: Runtime
) -> None:
    """Give their states to attention layers, and to all other modules that share a switched config."""
    switched = {id(switch.config) for switch in switches if switch.attribute == ATTENTION_SWITCH}

    def state(found: Survey, name: str) -> attention.AttentionState:
        return found.attention.get(name, AttentionPlan(name)).state(runtime)

    for name, module in model.named_modules():
        if id(module.__dict__.get("config")) in switched and STATES not in module.__dict__:
            states = _by_phase(surveys, functools.partial(state, name=name))
            put_states(module, attention.STATE, states, runtime.phase)


ATTENTION_SWITCH, EXPERTS_SWITCH = "_attn_implementation", "_experts_implementation"
"""Attributes of a model config that select the computation of attention, and of experts."""


def _switches(model: nn.Module, surveys: Mapping[Phase, Survey]) -> tuple[ConfigSwitch, ...]:
    """Give the model its own copies of the configs, and return the switches in those of the modules on hardware.

    The copies are needed because another model may share a config and must not be switched with this one. transformers
    selects the attention of all layers, and its mask, by one config, so all layers switch together. It selects the
    computation of experts by the config of each layer's experts module, so the modules on hardware get a config each
    and all others compute as before.
    """
    attended = [phase for phase, found in surveys.items() if found.attention]
    layers = [model.get_submodule(name) for phase in attended for name in surveys[phase].attention]
    stacked: dict[str, tuple[nn.Module, list[Phase]]] = {}
    for phase, found in surveys.items():
        for item in found.covered:
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
    for config in {id(layer.config): layer.config for layer in layers}.values():
        original = getattr(config, ATTENTION_SWITCH)
        names = {phase: attention.function_name(original, surveys[phase].result.hardware) for phase in attended}
        switches.append(ConfigSwitch(config, ATTENTION_SWITCH, original, names))
    if stacked:
        experts.register()
    for module, phases in stacked.values():
        config = module.__dict__["config"] = copy.copy(module.config)
        names = dict.fromkeys(phases, experts.NAME)
        switches.append(ConfigSwitch(config, EXPERTS_SWITCH, getattr(config, EXPERTS_SWITCH), names))
    return tuple(switches)
