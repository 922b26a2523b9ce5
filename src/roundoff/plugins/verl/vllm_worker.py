"""The hardware in vLLM's workers. Written from the sources of verl 0.9.1; NEVER RUN, because no GPU was at hand.

verl gives vLLM's worker a base class of ours, `rollout.engine_kwargs.vllm.worker_extension_cls`. It

- quantizes each Linear weight as it arrives, by its Hugging Face name and before vLLM fuses q, k, v or gate, up, so
  that scales are those of the training pass;
- puts a method between each of vLLM's Linear layers and its product, which quantizes the input and perturbs the output
  before the bias is added;
- draws AQN on the norms after each weight sync, and takes it off for evaluations (`AqnSwitch`).

What it cannot do, and refuses: noise on attention (it is inside vLLM's kernels), deadzones and faults, experts,
tensor parallelism (noise belongs on the whole product, not on a rank's part of the sum), compiled graphs, weights that
vLLM has quantized itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from roundoff.config import ConfigError, Hardware
from roundoff.hardware.inventory import exclusion, layer_index, plain_name
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from roundoff.plugins.verl.aqn_switch import AqnSwitch
from roundoff.plugins.verl.settings import PluginSettings, from_environment

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers of vLLM that hold several Linears of the Hugging Face model."""


@dataclass
class HardwareMethod:
    """In the place of a Linear layer's `quant_method`: the same product with quantized input and a noisy output."""

    inner: Any
    activation_format: str | None
    relative_std: float
    key: Key
    calls: int = 0

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product [..., out] of x [..., in]."""
        if self.activation_format is not None:
            x = quantize(x, self.activation_format, tensor_scale="row")
        y: Tensor = self.inner.apply(layer, x, None)
        if self.relative_std:
            matmul_noise(y, self.relative_std, self.key.fold(self.calls), out=y)
            self.calls += 1
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        """Everything else is the layer's own method's."""
        return getattr(self.inner, name)


class HardwareWorker(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """What verl's extension of vLLM's worker does, on simulated hardware."""

    def _roundoff(self) -> tuple[PluginSettings, AqnSwitch]:
        """Settings and switch of this worker; the hardware is installed at the first call."""
        found = self.__dict__.get("_roundoff_state")
        if found is None:
            settings = from_environment(os.environ)
            if settings is None:
                raise ConfigError("this vLLM worker has no ROUNDOFF_VERL_SETTINGS: forward it to every process")
            model = self.model_runner.model
            if not self.model_runner.vllm_config.model_config.enforce_eager:
                raise ConfigError("compiled graphs would not see the hardware: set rollout.enforce_eager=True")
            if not settings.hardware.changes_nothing:
                replica = int(os.environ.get("VERL_REPLICA_RANK", "0"))
                install_in_vllm(model, settings.hardware, Key.from_seed(settings.seed).fold("vllm rollout", replica))
            switch = AqnSwitch(model, settings.aqn, Key.from_seed(settings.seed), settings.multipliers)
            found = (settings, switch)
            self.__dict__["_roundoff_state"] = found
        return found

    def update_weights_from_ipc(self, *args: Any, **options: Any) -> None:
        """verl's, with AQN off the old weights before and on the new ones behind."""
        _, switch = self._roundoff()
        switch.before_sync()
        super().update_weights_from_ipc(*args, **options)
        switch.after_sync()

    def _update_weights(self, weights: list[tuple[str, Tensor]], peft_config: Any, base_sync_done: bool) -> None:
        """verl's, with base weights quantized on their way; adapters pass as they are."""
        if not (peft_config and base_sync_done):
            hardware = self._roundoff()[0].hardware
            weights = [(name, quantized(name, tensor, hardware)) for name, tensor in weights]
        super()._update_weights(weights, peft_config, base_sync_done)

    def roundoff_announce(self, step: int, sigma: float) -> None:
        """What the next sync is for."""
        self._roundoff()[1].announce(step, sigma)

    def roundoff_evaluation(self, on: bool) -> None:
        """Begin or end an evaluation."""
        self._roundoff()[1].evaluation(on)

    def roundoff_report(self, fingerprint: str) -> None:
        """Compare settings with the trainer's; verl's server gives no result back, so a difference is raised.

        Raises:
            ConfigError: if this worker computes on other hardware.
        """
        own = self._roundoff()[0].fingerprint
        if own != fingerprint:
            raise ConfigError(f"this vLLM worker has settings {own}, the trainer {fingerprint}")


def quantized(name: str, tensor: Tensor, hardware: Hardware) -> Tensor:
    """Q(W) for the weight of a Linear that the hardware computes, else the tensor itself; by Hugging Face name."""
    module, _, kind = plain_name(name).rpartition(".")
    layer = layer_index(module)
    fmt = hardware.precision.weight
    if fmt is None or kind != "weight" or tensor.dim() != 2 or layer is None or layer in hardware.precision.keep:
        return tensor
    return tensor if exclusion(module, hardware.exclude) else quantize(tensor, fmt)


def install_in_vllm(model: nn.Module, hardware: Hardware, key: Key) -> int:
    """Put vLLM's Linear layers on the hardware; how many.

    Raises:
        ConfigError: for what cannot be simulated in vLLM, or if no layer is found.
    """
    from vllm.model_executor.layers.linear import LinearBase

    noise = hardware.matmul_noise
    std = noise.relative_std if noise.forward else 0.0
    refused = {
        "hardware.matmul_noise.attention = true": bool(std and noise.attention),
        "hardware.deadzone": hardware.deadzone is not None,
        "hardware.faults": bool(hardware.faults),
        "hardware.exclude without lm_head": exclusion("lm_head", hardware.exclude) is None,
        "a mixture of experts": any(type(module).__name__.endswith("FusedMoE") for module in model.modules()),
    }
    for what, found in refused.items():
        if found:
            raise ConfigError(f"{what} cannot be simulated in vLLM: change it, or use rollout.name=roundoff")
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) or _excluded(name, hardware):
            continue
        if getattr(module, "tp_size", 1) != 1:
            raise ConfigError("set actor_rollout_ref.rollout.tensor_model_parallel_size=1: noise needs whole products")
        if type(module.quant_method).__name__ != "UnquantizedLinearMethod":
            raise ConfigError(f"{name} is quantized by vLLM ({type(module.quant_method).__name__}): leave that out")
        kept = layer_index(name) in hardware.precision.keep
        fmt = None if kept else hardware.precision.activation
        module.quant_method = HardwareMethod(module.quant_method, fmt, std, key.fold(name))
        count += 1
    if not count:
        raise ConfigError("no Linear layer of vLLM's model is left for the hardware")
    return count


def _excluded(name: str, hardware: Hardware) -> bool:
    """Whether a layer of vLLM's is excluded; a fused one must be so as a whole."""
    parent, _, last = name.rpartition(".")
    names = [f"{parent}.{part}" for part in FUSED.get(last, (last,))]
    found = [exclusion(part, hardware.exclude) is not None for part in names]
    if any(found) != all(found):
        raise ConfigError(f"hardware.exclude takes out a part of {name}, which vLLM computes as one: exclude all of it")
    return found[0]
