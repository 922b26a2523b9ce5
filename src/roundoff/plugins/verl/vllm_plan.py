"""What each of vLLM's Linear layers computes in rollouts and in evaluation, from the settings and the layers' names.

vLLM computes q, k and v as one product, and gate and up as another. Their weights are quantized one by one before vLLM
joins them, but their input and the noise on their output are those of the one product. `vllm_worker` carries the plan
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from roundoff.config import ConfigError, Hardware, HardwareOfAPhase, Phase, first_line
from roundoff.hardware.inventory import check_rules, exclusion, kept_layers, layer_index, plain_name
from roundoff.plugins.verl.vllm_limits import SAMPLED, check_vllm

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers of vLLM that combine several Linears of the Hugging Face model, with the names of these."""


@dataclass(frozen=True, slots=True)
class LayerArithmetic:
    """What is simulated around the product of one of vLLM's layers in one phase."""

    activation: str | None = None
    """Format of the input; None: it is not quantized."""
    relative_std: float = 0.0
    """Relative standard deviation of the noise on the output (fraction)."""


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """What each layer computes."""

    layers: Mapping[str, Mapping[Phase, LayerArithmetic]]
    """The arithmetic of each of vLLM's Linear layers in each phase; layers that both phases exclude are left out."""
    rollout: Hardware
    """The hardware of rollouts, with `precision.keep` counted from the first layer."""

    def weight_format(self, name: str) -> str | None:
        """The format of the parameter with this Hugging Face name; None if it is not quantized."""
        module, _, kind = plain_name(name).rpartition(".")
        layer = layer_index(module)
        if kind != "weight" or layer is None or layer in self.rollout.precision.keep:
            return None
        return None if exclusion(module, self.rollout.exclude) else _at(self.rollout, module).precision.weight


def plan(hardware: Hardware, names: Iterable[str]) -> VllmPlan:
    """The plan for a model whose Linear layers have these names in vLLM.

    Raises:
        ConfigError: if vLLM cannot simulate the hardware, if no layer is left for it, if a setting names a layer or
            module that is not there, or if it treats parts of what vLLM computes as one differently.
    """
    check_vllm(hardware)
    names = list(names)
    resolved = {phase: _with_layers(hardware.of(phase), names, phase) for phase in SAMPLED}
    layers: dict[str, dict[Phase, LayerArithmetic]] = {}
    for name in names:
        found = {phase: _of_layer(one, name) for phase, one in resolved.items()}
        if any(arithmetic is not None for arithmetic in found.values()):
            layers[name] = {phase: arithmetic or LayerArithmetic() for phase, arithmetic in found.items()}
    if not layers:
        raise ConfigError("no Linear layer of vLLM's model is left for the hardware")
    return VllmPlan(layers, resolved["rollout"])


def _parts(name: str) -> list[str]:
    """The Hugging Face names of what one of vLLM's layers combines."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in FUSED.get(last, (last,))]


def _with_layers(hardware: Hardware, names: list[str], phase: Phase) -> Hardware:
    """The hardware of a phase with `precision.keep` counted from the first layer, after a check of what it names."""
    parts = [part for name in names for part in _parts(name) if exclusion(part, hardware.exclude) is None]
    if not parts:
        return hardware
    check_rules(hardware, parts)
    layers = {layer for layer in map(layer_index, parts) if layer is not None}
    keep = kept_layers(hardware.precision.keep, layers)
    for layer in keep:
        if layer not in layers:
            raise ConfigError(f"hardware.precision.keep (of {phase}) names layer {layer}, which vLLM's model has not")
    return hardware.with_keep(lambda _: keep)


def _of_layer(hardware: Hardware, name: str) -> LayerArithmetic | None:
    """What a phase does around the product of one of vLLM's layers; None if it excludes the layer.

    Raises:
        ConfigError: if it does not do the same to all parts of the layer.
    """
    parts = {part: _of_part(hardware, part) for part in _parts(name)}
    found = set(parts.values())
    if len(found) > 1:
        setting = (
            "hardware.exclude takes out a part" if None in found else "hardware.rules set inputs or noise of parts"
        )
        raise ConfigError(f"{setting} of {name}, which vLLM computes as one: treat {', '.join(parts)} alike")
    return found.pop()


def _of_part(hardware: Hardware, name: str) -> LayerArithmetic | None:
    if exclusion(name, hardware.exclude) is not None:
        return None
    here = _at(hardware, name)
    kept = layer_index(name) in hardware.precision.keep
    noise = here.matmul_noise
    return LayerArithmetic(None if kept else here.precision.activation, noise.relative_std if noise.forward else 0.0)


def _at(hardware: Hardware, name: str) -> HardwareOfAPhase:
    try:
        return hardware.at(name)
    except ValidationError as error:
        raise ConfigError(f"hardware.rules: of those that match {name}, {first_line(error)}") from None
