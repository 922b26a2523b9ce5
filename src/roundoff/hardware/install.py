"""Putting a model on simulated hardware, and taking it off again."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from roundoff.config import ConfigError, Hardware
from roundoff.hardware import attention
from roundoff.hardware.draw import Draw, Runtime
from roundoff.hardware.faults import InstalledFault, install_fault
from roundoff.hardware.inventory import Entry, Found, Skipped, exclusion, find_linears, plain_name, within_layer
from roundoff.hardware.linear import HardwareLinear, LinearState
from roundoff.numerics.rng import Key

MARK = "hardware_installed"
"""Attribute of an installed model that holds its `InstalledHardware`."""


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
    linears: tuple[HardwareLinear, ...] = field(repr=False)
    attention_modules: tuple[nn.Module, ...] = field(repr=False)
    configs: tuple[tuple[Any, str | None], ...] = field(repr=False)
    """Model configs whose attention was switched, each with the implementation it had."""

    def __post_init__(self) -> None:
        self._count_fused_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (deepcopy, pickle) watches optimizers for its own weights."""
        self.__dict__.update(state)
        self._count_fused_steps()

    def _count_fused_steps(self) -> None:
        """Count the writes of `fused=True` optimizers, which leave torch's version counters as they were.

        An optimizer hook, taken away with this object: without it `Q(W)` would stay that of the first step for ever.
        """
        reference = weakref.ref(self)

        def count(optimizer: torch.optim.Optimizer, _arguments: Any, _named: Any) -> None:
            found = reference()
            if found is not None:
                weights = {id(module.weight) for module in found.linears}
                stepped = [p for group in optimizer.param_groups for p in group["params"] if id(p) in weights]
                torch.autograd.graph.increment_version(stepped)

        handle = register_optimizer_step_post_hook(count)
        weakref.finalize(self, handle.remove)

    @property
    def is_on(self) -> bool:
        """Whether the hardware is in force (it is not inside `hardware_off`)."""
        return self.runtime.on

    def summary(self) -> str:
        """A few lines: what is computed how, on how many modules, and what was left alone for which reason."""
        kinds = Counter(_describe(entry) for entry in self.entries)
        lines = [f"{count:4d} modules: {kind}" for kind, count in kinds.items()] or ["no module: nothing to simulate"]
        if self.attention_modules:
            std = self.hardware.matmul_noise.relative_std
            lines.append(f"{len(self.attention_modules):4d} attention layers: noise {std:g} on QK^T and PV")
        reasons = Counter(skip.reason for skip in self.skipped)
        lines += [f"{count:4d} skipped: {reason}" for reason, count in reasons.items()]
        lines += [f"     NaN or Inf in {name}" for name in self.nonfinite]
        return "\n".join(lines)

    def check_weights(self) -> tuple[str, ...]:
        """Names of the installed weights and biases that hold NaN or Inf now (reads each once)."""
        return _nonfinite_weights(self.model, {entry.name for entry in self.entries})

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
        """Quantize every weight again at its next use; needed after changes through `weight.data` (PEFT's merge)."""
        for module in self.linears:
            module.hardware_state.refresh()
        self.runtime.shared = None

    def quantizations(self) -> int:
        """How often a weight was quantized so far, over all modules."""
        return sum(module.hardware_state.quantizations for module in self.linears)

    def switch(self, on: bool) -> None:
        """Put the hardware in force or out of force; `hardware_off` is the safe way."""
        self.runtime.on = on
        self.runtime.shared = None
        for config, original in self.configs:
            config._attn_implementation = attention.NAME if on else original


def _describe(entry: Entry) -> str:
    parts = [f"weight {entry.weight or 'high precision'}, activation {entry.activation or 'high precision'}"]
    if entry.noise:
        parts.append(f"noise {entry.noise:g}")
    if entry.deadzone:
        parts.append(f"deadzone {entry.deadzone:g}")
    parts += [f"fault {kind}" for kind in entry.faults]
    return ", ".join(parts)


def install(model: nn.Module, hardware: Hardware, *, seed: int) -> InstalledHardware:
    """Put `model` on the hardware, in place, and say what was done to which module.

    The class of each Linear is swapped, so parameters, their names, the state dict, PEFT and optimizers go on as
    before. `seed` fixes the draws outside of `noise_key` and the channels that faults break.

    Raises:
        ConfigError: if no module matches, if a setting names a layer or module that does not exist, if
            `precision.keep` is not resolved yet, or if the model is installed already.
    """
    if installed(model) is not None:
        raise ConfigError("hardware is installed on this model already: uninstall it before installing again")
    found, skipped = find_linears(model, hardware)
    attention_modules = _attention_modules(model, hardware)
    runtime = Runtime(Key.from_seed(seed).fold("hardware"))
    output = _output_embedding(model)
    entries: list[Entry] = []
    linears: list[HardwareLinear] = []
    for item in found:
        state, entry = _plan(item, hardware, runtime, is_output=item.module is output)
        if state is None:
            skipped.append(Skipped(item.name, "the settings change nothing here (precision.keep)"))
            continue
        entries.append(entry)
        item.module.__class__ = HardwareLinear
        item.module.__dict__["hardware_state"] = state
        assert isinstance(item.module, HardwareLinear)
        linears.append(item.module)
    if not entries and not hardware.changes_nothing:
        raise ConfigError(
            "hardware.precision.keep keeps every layer in high precision, so the hardware would do nothing: "
            "keep fewer layers, or add noise"
        )
    configs = _install_attention(model, attention_modules, hardware, runtime)
    result = InstalledHardware(
        hardware,
        seed,
        tuple(entries),
        tuple(skipped),
        _nonfinite_weights(model, {entry.name for entry in entries}),
        model,
        runtime,
        tuple(linears),
        tuple(module for _, module in attention_modules),
        configs,
    )
    result.switch(True)
    model.__dict__[MARK] = result
    return result


def uninstall(model: nn.Module) -> None:
    """Take the hardware off: the model is the plain one again, with the weights it has now.

    Raises:
        ConfigError: if no hardware is installed.
    """
    found = required(model)
    found.switch(False)
    for module in found.linears:
        module.__class__ = nn.Linear  # type: ignore[assignment]
        del module.__dict__["hardware_state"]
    for attention_module in found.attention_modules:
        del attention_module.__dict__[attention.STATE]
    del found.model.__dict__[MARK]


def installed(model: nn.Module) -> InstalledHardware | None:
    """The hardware installed on a model or within its wrapping (PEFT, data parallel); None where there is none."""
    for module in model.modules():
        found = module.__dict__.get(MARK)
        if isinstance(found, InstalledHardware):
            return found
    return None


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
    """
    found = required(model)
    before = found.is_on
    found.switch(False)
    try:
        yield
    finally:
        found.switch(before)


@contextmanager
def noise_key(model: nn.Module, key: Key, rows: Tensor | None = None) -> Iterator[None]:
    """Every product of `model` inside draws from `key`, its own name and the row ids: same key, same bits.

    `rows` [B, T] int64 holds the identity of each token of the forward pass, `rollout_id * 2**20 + position` with
    positions counted without padding; the tensor must not be changed afterwards. None: row ids count within the batch.
    A backward pass uses the draw of its forward pass wherever it runs, except that gradient checkpointing computes the
    forward pass again: keep the block open over `backward()` then. Blocks may be nested; the inner one counts.
    """
    runtime = required(model).runtime
    before = runtime.draw
    runtime.draw = Draw(key, rows)
    runtime.keyed = True
    try:
        yield
    finally:
        runtime.draw = before


def _plan(item: Found, hardware: Hardware, runtime: Runtime, *, is_output: bool) -> tuple[LinearState | None, Entry]:
    """State and report entry of one Linear; no state where the settings change nothing."""
    precision, noise = hardware.precision, hardware.matmul_noise
    kept = item.layer is not None and item.layer in precision.keep
    weight, activation = (None, None) if kept else (precision.weight, precision.activation)
    zone = hardware.deadzone
    deadzone = zone.threshold if zone is not None and item.layer in zone.layers else 0.0
    faults = _faults_of(item, hardware, runtime)
    kinds = tuple(f.fault.kind for f in faults)
    entry = Entry(item.name, item.layer, weight, activation, noise.relative_std, deadzone, kinds)
    if not (weight or activation or noise.relative_std or deadzone or faults):
        return None, entry
    state = LinearState(
        item.plain_name,
        runtime,
        weight,
        activation,
        noise.relative_std if noise.forward else 0.0,
        noise.relative_std if noise.backward else 0.0,
        deadzone,
        faults,
        is_output,
    )
    return state, entry


def _faults_of(item: Found, hardware: Hardware, runtime: Runtime) -> tuple[InstalledFault, ...]:
    """The faults of the unit that computes this Linear, with their broken channels."""
    assert isinstance(item.module, nn.Linear)
    found = []
    for index, fault in enumerate(hardware.faults):
        if fault.layer != item.layer or fault.module not in (None, within_layer(item.plain_name)):
            continue
        if fault.kind == "bitflip" and fault.bit < 16 and item.module.weight.dtype is torch.bfloat16:
            raise ConfigError(
                f"hardware.faults.{index}.bit must be 16 or more on a bfloat16 model, which has no bit {fault.bit}"
            )
        if fault.share == 0:
            raise ConfigError(f"hardware.faults.{index}.share is 0, so the fault would do nothing")
        key = runtime.seed_key.fold("fault", index, item.plain_name)
        found.append(install_fault(fault, item.module.out_features, key))
    return tuple(found)


def _attention_modules(model: nn.Module, hardware: Hardware) -> list[tuple[str, nn.Module]]:
    """Attention modules whose products get noise.

    Raises:
        ConfigError: if attention noise is asked for and the model does not go through transformers' interface.
    """
    noise = hardware.matmul_noise
    if not (noise.relative_std and noise.attention):
        return []
    found = []
    supported = any(getattr(module, "_supports_attention_backend", False) for module in model.modules())
    for name, module in model.named_modules():
        has_products = hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
        if supported and has_products and "config" in module.__dict__:
            found.append((name, module))
    if not found:
        raise ConfigError(
            "hardware.matmul_noise.attention = true, but this model has no attention that goes through transformers' "
            "attention interface: set hardware.matmul_noise.attention = false"
        )
    return found


def _install_attention(
    model: nn.Module, modules: list[tuple[str, nn.Module]], hardware: Hardware, runtime: Runtime
) -> tuple[tuple[Any, str | None], ...]:
    """Give attention modules their state, and the model configs of its own, so that no other model is switched."""
    if not modules:
        return ()
    noise = hardware.matmul_noise
    attention.register()
    for name, module in modules:
        std = 0.0 if exclusion(name, hardware.exclude) else noise.relative_std
        module.__dict__[attention.STATE] = attention.AttentionState(
            plain_name(name), runtime, std if noise.forward else 0.0, std if noise.backward else 0.0
        )
    wanted = {id(module.config): module.config for _, module in modules}
    copies: dict[int, Any] = {}  # memo of deepcopy: nested configs stay nested and shared ones shared
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            module.__dict__["config"] = copy.deepcopy(config, copies)
    own = {id(copies[key]): copies[key] for key in wanted}
    return tuple((config, config._attn_implementation) for config in own.values())


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits; None where the model does not say."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _nonfinite_weights(model: nn.Module, names: set[str]) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in names and not bool(parameter.detach().isfinite().all())
    )
