"""What is installed on a model: the report, the switch, and the contexts that a model runs in."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from roundoff.config import ConfigError, Hardware
from roundoff.hardware import experts
from roundoff.hardware.draw import Draw, Runtime
from roundoff.hardware.inventory import Entry, Skipped, described, plain_name, where
from roundoff.hardware.linear import LINEAR_STATE, LinearState
from roundoff.hardware.paths import check_adapters
from roundoff.numerics.rng import Key

MARK = "hardware_installed"
"""Attribute of an installed model that holds its `InstalledHardware`."""


@dataclass(frozen=True, slots=True)
class ConfigSwitch:
    """An attribute of a model config that chooses between the plain and the installed computation."""

    config: Any
    attribute: str
    original: str | None
    installed: str


@dataclass(eq=False)
class InstalledHardware:
    """What was installed where; `install` returns it and the model carries it."""

    hardware: Hardware
    seed: int
    entries: tuple[Entry, ...]
    """Modules that the hardware computes."""
    skipped: tuple[Skipped, ...]
    """Modules with weights that it does not compute, each with the reason."""
    nonfinite: tuple[str, ...]
    """Weights that held NaN or Inf at install: every block with one becomes NaN."""
    model: nn.Module = field(repr=False)
    runtime: Runtime = field(repr=False)
    modules: tuple[nn.Module, ...] = field(repr=False)
    """The Linears and experts of `entries`."""
    states: tuple[LinearState, ...] = field(repr=False)
    attention_modules: tuple[nn.Module, ...] = field(repr=False)
    switches: tuple[ConfigSwitch, ...] = field(repr=False)

    def __post_init__(self) -> None:
        self.runtime.owner = weakref.ref(self)
        self._count_fused_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (deepcopy, pickle) watches optimizers for its own weights."""
        self.__dict__.update(state)
        self.__post_init__()
        self.switch(self.runtime.on)

    def covered(self) -> list[nn.Module]:
        """The Linears and experts on this hardware now, with the copies that PEFT put in the place of some."""
        return [module for module in self.model.modules() if states_of(module)]

    def current_states(self) -> list[LinearState]:
        """The states of `covered`."""
        return [state for module in self.covered() for state in states_of(module)]

    def _count_fused_steps(self) -> None:
        """Count the writes of `fused=True` optimizers, which leave torch's version counters as they were.

        An optimizer hook; once this object is gone it does nothing. It is not taken away then, because objects may go
        while an optimizer runs through its hooks, which torch does not allow to change meanwhile.
        """
        reference = weakref.ref(self)

        def count(optimizer: torch.optim.Optimizer, _arguments: Any, _named: Any) -> None:
            found = reference()
            if found is not None:
                weights = {id(p) for module in found.covered() for p in module.parameters(recurse=False)}
                stepped = [p for group in optimizer.param_groups for p in group["params"] if id(p) in weights]
                torch.autograd.graph.increment_version(stepped)

        register_optimizer_step_post_hook(count)

    @property
    def is_on(self) -> bool:
        """Whether the hardware is in force (it is not inside `hardware_off`)."""
        return self.runtime.on

    def summary(self) -> str:
        """A few lines: what is computed how, on how many modules, and what was left alone for which reason."""
        kinds: dict[str, list[Entry]] = {}
        for entry in self.entries:
            kinds.setdefault(described(entry), []).append(entry)
        lines = [f"{len(e):4d} modules: {kind}\n     {where(e)}" for kind, e in kinds.items()]
        lines = lines or ["no module: nothing to simulate"]
        if self.attention_modules:
            std = self.hardware.matmul_noise.relative_std
            lines.append(f"{len(self.attention_modules):4d} attention layers: noise {std:g} on QK^T and PV")
        reasons = Counter(skip.reason for skip in self.skipped)
        lines += [f"{count:4d} skipped: {reason}" for reason, count in reasons.items()]
        lines += [f"     NaN or Inf in {name}" for name in self.nonfinite]
        return "\n".join(lines)

    def check_weights(self) -> tuple[str, ...]:
        """Names of the installed weights and biases that hold NaN or Inf now (reads each once)."""
        return nonfinite_weights(self.model, {entry.name for entry in self.entries})

    def diagnose(self, **batch: Any) -> tuple[str, ...]:
        """Names of the modules, in order of execution, whose output is not finite in a forward pass on `batch`."""
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
        """Quantize every weight again at its next use."""
        for state in self.current_states():
            state.refresh()
        self.runtime.shared = None

    def quantizations(self) -> int:
        """How often a weight was quantized so far, over all modules."""
        return sum(state.quantizations for state in self.current_states())

    def switch(self, on: bool) -> None:
        """Put the hardware in force or out of force; `hardware_off` is the safe way."""
        self.runtime.on = on
        self.runtime.shared = None
        for switch in self.switches:
            setattr(switch.config, switch.attribute, switch.installed if on else switch.original)

    def check_switches(self) -> None:
        """Check that attention and experts are computed by what was installed, or is plain while the hardware is off.

        Raises:
            ConfigError: if somebody chose another function (`set_attn_implementation`), which knows no noise.
        """
        for switch in self.switches:
            expected = switch.installed if self.runtime.on else switch.original
            chosen = getattr(switch.config, switch.attribute)
            if chosen != expected:
                raise ConfigError(
                    f"{switch.attribute} of the model's config was set to {chosen!r} after install, which leads around "
                    f"the hardware: set it back to {expected!r}, or uninstall, choose, and install again"
                )

    def check_reach(self, model: nn.Module) -> None:
        """Check that the switches of this hardware reach every module of `model`, and that none leads around it.

        Raises:
            ConfigError: if a module belongs to the hardware of another model, if adapters compute around it, or if a
                module that was copied within the model draws the noise of the other one.
        """
        self.check_switches()
        check_adapters(model, self.covered())
        names: dict[str, str] = {}
        for name, module in model.named_modules():
            if any(state.runtime is not self.runtime for state in states_of(module)[:1]):
                raise ConfigError(
                    f"{name} belongs to the hardware of another model, whose switches are not those of this one: "
                    "uninstall both models, and install on this one"
                )
            for state in states_of(module) if self.hardware.is_noisy and "modules_to_save" not in name else ():
                if names.setdefault(state.name, name) != name and "original_module" not in name:
                    raise ConfigError(
                        f"{name} is a copy of {names[state.name]} and draws the same noise: uninstall, install again"
                    )

    def as_now(self) -> AbstractContextManager[None]:
        """A block, to be entered once and later, in which products draw as they would at this call.

        For gradient checkpointing, which computes a layer again: same key and row ids, or the same call counters, and
        the hardware on or off as it is now.
        """
        runtime = self.runtime
        draw, on = runtime.draw, runtime.on
        calls = dict(runtime.calls) if draw is None else runtime.calls

        @contextmanager
        def entered() -> Iterator[None]:
            before = runtime.draw, runtime.calls, runtime.replaying
            was_on = runtime.on
            runtime.draw, runtime.calls, runtime.replaying = draw, calls, True
            if on != was_on:
                self.switch(on)
            try:
                yield
            finally:
                runtime.draw, runtime.calls, runtime.replaying = before
                if on != was_on:
                    self.switch(was_on)

        return entered()


def nonfinite_weights(model: nn.Module, names: set[str]) -> tuple[str, ...]:
    """Names of the parameters of the named modules that hold NaN or Inf; names are without what PEFT adds to them.

    Parameters without values (on torch's meta device) are passed over.
    """
    plain = ((*name.rpartition(".")[::2], parameter) for name, parameter in model.named_parameters())
    return tuple(
        f"{plain_name(module)}.{name}"
        for module, name, parameter in plain
        if plain_name(module) in names and not parameter.is_meta and not bool(parameter.detach().isfinite().all())
    )


def states_of(module: nn.Module) -> list[LinearState]:
    """The states of a Linear or of experts on hardware; empty for every other module."""
    linear = module.__dict__.get(LINEAR_STATE)
    if linear is not None:
        return [linear]
    stacked = module.__dict__.get(experts.STATE)
    return [] if stacked is None else stacked.states()


def installed(model: nn.Module) -> InstalledHardware | None:
    """The hardware that a model, a part of it, or a wrapper (PEFT, data parallel) computes on; None if there is none.

    Raises:
        ConfigError: if a module was copied out of another installed model, whose switches would not reach it, or if
            the wrapper holds several installed models.
    """
    found = _marked(model)
    if len(found) > 1:
        raise ConfigError(
            f"{type(model).__name__} holds {len(found)} models with installed hardware, each with switches and keys of "
            "its own: pass one of them"
        )
    if found:
        return found[0]
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
    """The hardware of a model, or of the models that it wraps, without looking into those."""
    own = model.__dict__.get(MARK)
    if isinstance(own, InstalledHardware):
        return [own]
    found = [inner for child in model.children() for inner in _marked(child)]
    return list(dict.fromkeys(found))


def required(model: nn.Module) -> InstalledHardware:
    """The hardware installed on a model.

    Raises:
        ConfigError: if there is none.
    """
    found = installed(model)
    if found is None:
        raise ConfigError("no hardware is installed on this model: call install(model, hardware, seed=...) first")
    return found


@contextmanager
def hardware_off(model: nn.Module) -> Iterator[None]:
    """Plain arithmetic inside: the exact bits of the model before `install` with the weights it has now.

    With gradient checkpointing the block must enclose `backward()` as well, which computes the forward pass again.

    Raises:
        ConfigError: if no hardware is installed, or a module follows the switches of another model.
        RuntimeError: if another thread is inside a block of this model.
    """
    found = required(model)
    found.check_reach(model)
    block = found.runtime.enter("hardware_off", found.is_on)
    found.switch(False)
    try:
        yield
    finally:
        if found.runtime.leave(block):
            found.switch(block.before)


@contextmanager
def noise_key(model: nn.Module, key: Key, rows: Tensor | None = None) -> Iterator[None]:
    """Every product of `model` inside draws from `key`, its own name and the row ids: same key, same bits.

    `rows` [B, T] int64 holds the identity of each token of the forward pass, `rollout_id * 2**20 + position` with
    positions counted without padding; the tensor must not be changed afterwards. None: row ids count within the batch.
    A backward pass uses the draw of its forward pass wherever it runs, except that gradient checkpointing computes the
    forward pass again: keep the block open over `backward()` then. Blocks may be nested; the inner one counts. One
    block is for one forward pass: a second pass over the same rows inside of it meets the same noise.

    Raises:
        ConfigError: if no hardware is installed, or the model's attention was switched to another function since.
        RuntimeError: if another thread is inside a block of this model.
    """
    found = required(model)
    found.check_switches()
    runtime, draw = found.runtime, Draw(key, rows)
    block = runtime.enter("noise_key", runtime.draw)
    runtime.draw = draw
    try:
        yield
    finally:
        if runtime.leave(block):
            runtime.draw = block.before
