"""Installed hardware: its report, its switch, and how to find it on a model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from roundoff.config import ConfigError, Hardware, Phase
from roundoff.hardware.inventory import Entry, Skipped, plain_name
from roundoff.hardware.linear import LinearState
from roundoff.hardware.paths import check_adapters
from roundoff.hardware.phases import ConfigSwitch, PhaseHardware, put_in_force, states_of, states_of_phases
from roundoff.hardware.quantized_weight import QuantizedWeight
from roundoff.hardware.runtime import Runtime

MARK = "hardware_installed"
"""Attribute of an installed model that holds its `InstalledHardware`."""


_INSTALLATIONS: weakref.WeakValueDictionary[int, InstalledHardware] = weakref.WeakValueDictionary()
"""Every installation that is alive, by its identity."""


def _count_fused_steps(installation: InstalledHardware) -> None:
    """Count the writes of `fused=True` optimizers to the weights of an installation, which torch's versions leave out.

    One hook serves all installations. It is never removed: torch does not allow the hooks to change while an optimizer
    runs them, and an installation may be collected then.
    """
    _register_once()
    _INSTALLATIONS[id(installation)] = installation


@functools.cache
def _register_once() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Raise the version of every weight on hardware that an optimizer has moved."""
    moved = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for installation in list(_INSTALLATIONS.values()):
        own = [p for module in installation.covered() for p in module.parameters(recurse=False) if id(p) in moved]
        torch.autograd.graph.increment_version(own)


@dataclass(eq=False)
class InstalledHardware:
    """The hardware on a model; `install` returns it, and the model keeps it."""

    hardware: Hardware
    """The settings."""
    seed: int
    """Seed of the draws outside of `noise_key`, and of the channels that faults break."""
    phases: Mapping[Phase, PhaseHardware]
    """The hardware of each phase; phases that agree have one in common."""
    nonfinite: tuple[str, ...]
    """Weights that held NaN or Inf at install; every block that contains one becomes NaN."""
    model: nn.Module = field(repr=False)
    """The model."""
    runtime: Runtime = field(repr=False)
    """State that all its layers share."""
    switches: tuple[ConfigSwitch, ...] = field(repr=False)
    """Switches in the model's configs."""

    def __post_init__(self) -> None:
        self.runtime.owner = weakref.ref(self)
        _count_fused_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy (deepcopy, pickle), which counts the optimizer steps on its own weights."""
        self.__dict__.update(state)
        self.__post_init__()
        self.switch(self.runtime.on)

    @property
    def in_force(self) -> PhaseHardware:
        """The hardware of the phase that is in force."""
        return self.phases[self.runtime.phase]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Modules that the hardware of the phase in force computes."""
        return self.in_force.entries

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Modules with weights that it does not compute, each with the reason."""
        return self.in_force.skipped

    def covered(self) -> list[nn.Module]:
        """The Linears and experts on this hardware now, including copies with which PEFT replaced some."""
        return [module for module in self.model.modules() if states_of(module)]

    def current_states(self) -> list[LinearState]:
        """The states of the modules that `covered` returns."""
        return [state for module in self.covered() for state in states_of(module)]

    @property
    def is_on(self) -> bool:
        """Whether the hardware is on; it is off inside `hardware_off`."""
        return self.runtime.on

    def summary(self) -> str:
        """A few lines of text: how many modules are computed how, and how many were skipped for which reason."""
        different = list(dict.fromkeys(map(id, self.phases.values())))
        lines = []
        for number in different:
            names = [name for name, one in self.phases.items() if id(one) == number]
            lines += [f"# {' and '.join(names)}"] if len(different) > 1 else []
            lines += self.phases[names[0]].summary()
        lines += [f"     NaN or Inf in {name}" for name in self.nonfinite]
        return "\n".join(lines)

    def check_weights(self) -> tuple[str, ...]:
        """Names of the weights and biases on hardware that hold NaN or Inf now; each of them is read once."""
        entries = [entry for one in self.phases.values() for entry in one.entries]
        return nonfinite_weights(self.model, {plain_name(entry.name) for entry in entries})

    def diagnose(self, **batch: Any) -> tuple[str, ...]:
        """Run a forward pass and return the Linears whose output is not finite, in order of execution.

        Args:
            batch: arguments of the model.
        """
        names: list[str] = []

        def watch(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    names.append(name)

            return hook

        handles = [
            module.register_forward_hook(watch(name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with torch.no_grad():
                self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(names)

    def refresh(self) -> None:
        """Discard every `Q(W)` of every phase, so that each weight is quantized again at its next use."""
        for stored in self._stored():
            stored.refresh()
        self.runtime.shared = None

    def quantizations(self) -> int:
        """Number of quantizations of a weight so far, summed over all modules and phases."""
        return sum(stored.quantizations for stored in self._stored())

    def _stored(self) -> list[QuantizedWeight]:
        """The quantized weights of all phases, each once."""
        states = [state for module in self.covered() for state in states_of_phases(module)]
        return list({id(state.stored): state.stored for state in states}.values())

    def switch(self, on: bool) -> None:
        """Turn the hardware on or off; callers should use `hardware_off`, which restores the state."""
        self.runtime.on = on
        self._turn_switches()

    def enter_phase(self, phase: Phase) -> None:
        """Put the hardware of a phase in force; callers should use `hardware_phase`, which restores the state."""
        before, self.runtime.phase = self.in_force, phase
        if self.in_force is before:
            return
        self._turn_switches()
        stack: list[nn.Module | None] = [self.model]  # `modules()` also makes names, which takes four times as long
        while stack:
            module = stack.pop()
            if module is not None:
                put_in_force(module, phase)
                stack.extend(module._modules.values())

    def _turn_switches(self) -> None:
        self.runtime.shared = None
        for switch in self.switches:
            setattr(switch.config, switch.attribute, self._chosen(switch))

    def _chosen(self, switch: ConfigSwitch) -> str | None:
        """The computation that a config should select now."""
        return switch.installed.get(self.runtime.phase, switch.original) if self.runtime.on else switch.original

    def check_switches(self) -> None:
        """Check that attention and experts still use the installed function (the plain one while the hardware is off).

        Raises:
            ConfigError: if another function was selected after install (`set_attn_implementation`).
        """
        for switch in self.switches:
            expected = self._chosen(switch)
            chosen = getattr(switch.config, switch.attribute)
            if chosen != expected:
                raise ConfigError(
                    f"{switch.attribute} of the model's config was set to {chosen!r} after install, which bypasses the "
                    f"hardware: set it back to {expected!r}, or uninstall the hardware, set it, and install again"
                )

    def check_reach(self, model: nn.Module) -> None:
        """Check that this hardware reaches every module of `model`; called before the hardware is turned off.

        Raises:
            ConfigError: if a module belongs to the hardware of another model, if adapters bypass it, if another
                attention was selected, or if a module was copied within the model and draws the same noise as the
                original.
        """
        self.check_switches()
        check_adapters(model, self.covered())
        names: dict[str, str] = {}
        for name, module in model.named_modules():
            if any(state.runtime is not self.runtime for state in states_of(module)[:1]):
                raise ConfigError(
                    f"{name} belongs to the hardware of another model, so the switches of this model do not reach it: "
                    "uninstall both models, and install on this one"
                )
            for state in states_of(module) if self.hardware.is_noisy and "modules_to_save" not in name else ():
                if names.setdefault(state.name, name) != name and "original_module" not in name:
                    raise ConfigError(
                        f"{name} is a copy of {names[state.name]} and draws the same noise: uninstall, install again"
                    )

    def as_now(self) -> AbstractContextManager[None]:
        """A block, to be entered once at a later time, inside which products draw as they would now.

        Gradient checkpointing computes a layer again inside it: with the same key and row ids, or the same call
        counters, and with the hardware on or off and of the phase as it is now.
        """
        runtime = self.runtime
        draw, on, phase = runtime.draw, runtime.on, runtime.phase
        calls = dict(runtime.calls) if draw is None else runtime.calls

        @contextmanager
        def entered() -> Iterator[None]:
            before = runtime.draw, runtime.calls, runtime.replaying
            was_on, phase_before = runtime.on, runtime.phase
            runtime.draw, runtime.calls, runtime.replaying = draw, calls, True
            self.enter_phase(phase)
            if on != was_on:
                self.switch(on)
            try:
                yield
            finally:
                runtime.draw, runtime.calls, runtime.replaying = before
                self.enter_phase(phase_before)
                if on != was_on:
                    self.switch(was_on)

        return entered()


def nonfinite_weights(model: nn.Module, names: set[str]) -> tuple[str, ...]:
    """Names of the parameters of the named modules that hold NaN or Inf.

    Args:
        model: the model.
        names: names of modules, without the parts that PEFT adds. Parameters without values (on torch's meta device)
            are ignored.
    """
    plain = ((*name.rpartition(".")[::2], parameter) for name, parameter in model.named_parameters())
    return tuple(
        f"{plain_name(module)}.{name}"
        for module, name, parameter in plain
        if plain_name(module) in names and not parameter.is_meta and not bool(parameter.detach().isfinite().all())
    )


def installed(model: nn.Module) -> InstalledHardware | None:
    """The hardware of a model, of a part of it, or of a wrapper (PEFT, data parallel); None if there is none.

    Raises:
        ConfigError: if a module was copied from another installed model, whose switches would not reach it, or if the
            wrapper holds several installed models.
    """
    candidates = _marked(model)
    if len(candidates) > 1:
        raise ConfigError(
            f"{type(model).__name__} holds {len(candidates)} models with installed hardware, each with switches and "
            "keys of its own: pass one of them"
        )
    if candidates:
        return candidates[0]
    for name, module in model.named_modules():
        for state in states_of(module)[:1]:
            owner = state.runtime.owner() if state.runtime.owner is not None else None
            if isinstance(owner, InstalledHardware) and any(module is own for own in owner.model.modules()):
                return owner
            raise ConfigError(
                f"{name or 'this module'} was copied out of a model with installed hardware; neither hardware_off "
                "nor noise_key of this model would reach it: copy the whole model, or uninstall before copying"
            )
    return None


def _marked(model: nn.Module) -> list[InstalledHardware]:
    """The hardware of a model, or of the outermost installed models inside it."""
    own = model.__dict__.get(MARK)
    if isinstance(own, InstalledHardware):
        return [own]
    nested = [inner for child in model.children() for inner in _marked(child)]
    return list(dict.fromkeys(nested))


def required(model: nn.Module) -> InstalledHardware:
    """The hardware of a model, as `installed` finds it.

    Raises:
        ConfigError: if there is none.
    """
    hardware = installed(model)
    if hardware is None:
        raise ConfigError("no hardware is installed on this model: call install(model, hardware, seed=...) first")
    return hardware
