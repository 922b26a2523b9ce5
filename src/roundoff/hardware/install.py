"""Install simulated hardware on a model, and uninstall it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from roundoff.config import ConfigError, Fault, Hardware, MatmulNoise
from roundoff.hardware import attention, experts
from roundoff.hardware.attention_modules import attention_modules, attention_state, described
from roundoff.hardware.draw import Runtime
from roundoff.hardware.faults import install_fault
from roundoff.hardware.gradients import GradientArithmetic
from roundoff.hardware.installed import (
    MARK,
    ConfigSwitch,
    InstalledHardware,
    installed,
    nonfinite_weights,
    required,
)
from roundoff.hardware.inventory import Candidate, Entry, Skipped, find_linears, plain_name, within_layer
from roundoff.hardware.linear import LINEAR_STATE, HardwareLinear, LinearState
from roundoff.hardware.paths import check_paths, check_range
from roundoff.numerics.rng import Key


def install(model: nn.Module, hardware: Hardware, *, seed: int) -> InstalledHardware:
    """Install hardware on a model, in place; call this once, before sampling and training.

    The class of each Linear is swapped. Parameters, their names, the state dict, PEFT and optimizers work as before.

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
    candidates, skipped = find_linears(model, hardware)
    attended = attention_modules(model, hardware)
    runtime = Runtime(Key.from_seed(seed).fold("hardware"))
    output = _output_embedding(model)
    plans = {item.name: _plan(item, hardware, is_output=item.module is output) for item in candidates}
    covered = [item for item in candidates if plans[item.name].does_something]
    attention_states = [attention_state(name, hardware, runtime) for name, _ in attended]
    if not covered and not any(map(described, attention_states)) and not hardware.changes_nothing:
        raise ConfigError(
            "hardware.precision.keep keeps every layer in high precision, so the hardware would do nothing: "
            "keep fewer layers, or add noise"
        )
    unchanged = "change nothing here (precision.keep)" if covered else "concern attention alone"
    kept = [Skipped(item.name, f"the settings {unchanged}") for item in candidates]
    skipped += [skip for skip in kept if not plans[skip.name].does_something]
    check_paths(model, covered, hardware)
    check_range(covered, hardware.precision.weight)
    states = [state for item in covered for state in _attach(item, plans[item.name], runtime)]
    for (_, module), state in zip(attended, attention_states, strict=True):
        module.__dict__[attention.STATE] = state
    expert_modules = [item.module for item in covered if not isinstance(item.module, nn.Linear)]
    switches = _switches(model, hardware, [module for _, module in attended], expert_modules)
    _attach_bystanders(model, switches, runtime)
    result = InstalledHardware(
        hardware=hardware,
        seed=seed,
        entries=tuple(plans[item.name].entry for item in covered),
        skipped=tuple(skipped),
        nonfinite=nonfinite_weights(model, {item.plain_name for item in covered}),
        model=model,
        runtime=runtime,
        modules=tuple(item.module for item in covered),
        states=tuple(states),
        attention_modules=tuple(module for _, module in attended),
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
    for module in hardware.covered():
        if isinstance(module, HardwareLinear):
            module.__class__ = _plain_class(type(module))
            del module.__dict__[LINEAR_STATE]
        else:
            del module.__dict__[experts.STATE]
    for module in hardware.model.modules():
        module.__dict__.pop(attention.STATE, None)
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

    def state(self, name: str, out_features: int, runtime: Runtime) -> LinearState:
        """The state of one weight matrix with this many output channels."""
        key = runtime.seed_key.fold("fault", name)
        std = self.noise.relative_std
        return LinearState(
            name,
            runtime,
            weight_format=self.entry.weight,
            activation_format=self.entry.activation,
            forward_std=std if self.noise.forward else 0.0,
            backward_std=std if self.noise.backward else 0.0,
            deadzone=self.entry.deadzone,
            gradient=self.gradient,
            faults=tuple(install_fault(fault, out_features, key.fold(index)) for index, fault in self.faults),
            is_output=self.is_output,
        )


def _plan(item: Candidate, hardware: Hardware, *, is_output: bool) -> _Plan:
    """Derive from the settings what happens to one module.

    Raises:
        ConfigError: if a fault would do nothing, or inverts a bit that bfloat16 does not have.
    """
    precision, noise, zone = hardware.precision, hardware.matmul_noise, hardware.deadzone
    kept = item.layer is not None and item.layer in precision.keep
    weight, activation = (None, None) if kept else (precision.weight, precision.activation)
    gradient = None
    if precision.gradient is not None and not kept:
        gradient = GradientArithmetic(
            precision.gradient, precision.gradient_rounding == "stochastic", precision.hadamard == "dw"
        )
    deadzone = zone.threshold if zone is not None and item.layer in zone.layers else 0.0
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


def _attach(item: Candidate, plan: _Plan, runtime: Runtime) -> list[LinearState]:
    """Put one module on the hardware and return its states."""
    module = item.module
    if isinstance(module, nn.Linear):
        state = plan.state(item.plain_name, module.out_features, runtime)
        module.__class__ = HardwareLinear
        module.__dict__[LINEAR_STATE] = state
        return [state]
    linears: dict[str, list[LinearState]] = {}
    for projection in experts.PROJECTIONS:
        count, out_features, _ = getattr(module, projection).shape
        names = [f"{item.plain_name}.{expert}.{projection}" for expert in range(count)]
        linears[projection] = [plan.state(name, out_features, runtime) for name in names]
    module.__dict__[experts.STATE] = experts.ExpertsState(runtime, linears)
    return [state for states in linears.values() for state in states]


def _switches(
    model: nn.Module, hardware: Hardware, attended: list[nn.Module], expert_modules: list[nn.Module]
) -> tuple[ConfigSwitch, ...]:
    """Give the model its own copies of the configs, and return the switches in those of these modules.

    The copies are needed because another model may share a config and must not be switched with this one. transformers
    selects the attention of all layers, and its mask, by one config, so all layers switch together. It selects the
    computation of experts by the config of each layer's experts module, so the modules on hardware get a config each
    and all others compute as before.
    """
    if not attended and not expert_modules:
        return ()
    copies: dict[int, Any] = {}  # memo of deepcopy, so that nested configs stay nested and shared configs stay shared
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            module.__dict__["config"] = copy.deepcopy(config, copies)
    for module in expert_modules:
        module.__dict__["config"] = copy.copy(module.config)
    switches = []
    for modules, attribute, register in (
        (attended, "_attn_implementation", attention.register),
        (expert_modules, "_experts_implementation", experts.register),
    ):
        if modules:
            register()
        for config in {id(module.config): module.config for module in modules}.values():
            original = getattr(config, attribute)
            name = attention.function_name(original, hardware) if modules is attended else experts.NAME
            switches.append(ConfigSwitch(config, attribute, original, name))
    return tuple(switches)


def _attach_bystanders(model: nn.Module, switches: tuple[ConfigSwitch, ...], runtime: Runtime) -> None:
    """Give a state without noise to the other modules that share a switched attention config."""
    switched = {id(switch.config) for switch in switches if switch.attribute == "_attn_implementation"}
    for name, module in model.named_modules():
        if id(module.__dict__.get("config")) in switched and attention.STATE not in module.__dict__:
            module.__dict__[attention.STATE] = attention.AttentionState(plain_name(name), runtime, 0.0, 0.0)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None if the model does not name it."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
