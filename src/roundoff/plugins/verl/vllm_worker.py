"""The hardware in vLLM's workers. It was written from the sources of verl 0.9.1 and NEVER RUN, for want of a GPU.

With `rollout.engine_kwargs.vllm.worker_extension_cls`, verl gives vLLM's worker a base class from here. It

- quantizes each Linear weight when it arrives, by its Hugging Face name and before vLLM fuses q, k and v or gate and
  up, so that scales are those of the training pass;
- wraps the method by which each of vLLM's Linear layers computes its product, to quantize the input and perturb the
  output before the bias is added;
- draws AQN's noise on the norms after each weight sync, and removes it for evaluations (`AqnSwitch`).

It refuses what it cannot do: noise on attention and its formats (which are inside vLLM's kernels), deadzones and
faults, experts, tensor parallelism (noise belongs on the whole product, not on one rank's part of the sum), compiled
graphs, and weights that vLLM itself has quantized.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
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
"""Layers of vLLM that combine several Linears of the Hugging Face model, with the names of these."""


@dataclass
class HardwareMethod:
    """Replacement for a Linear layer's `quant_method`: the same product with quantized input and noisy output."""

    inner: Any
    """vLLM's own method."""
    activation_format: str | None
    """Format of the input; None: it is not quantized."""
    relative_std: float
    """Relative standard deviation of the noise on the output (fraction)."""
    key: Key
    """Key of the layer's noise."""
    calls: int = 0
    """Products so far, each of which gets a draw of its own."""

    def apply(
        self,
        layer: nn.Module,
        x: Float[Tensor, "*rows in_features"],
        bias: Float[Tensor, " out_features"] | None = None,
    ) -> Float[Tensor, "*rows out_features"]:
        """The layer's output for the input `x`."""
        if self.activation_format is not None:
            x = quantize(x, self.activation_format, tensor_scale="row")
        y: Tensor = self.inner.apply(layer, x, None)
        if self.relative_std:
            matmul_noise(y, self.relative_std, self.key.fold(self.calls), out=y)
            self.calls += 1
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of vLLM's method."""
        return getattr(self.inner, name)


class HardwareWorker(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl's extension of vLLM's worker, on simulated hardware."""

    def _roundoff(self) -> tuple[PluginSettings, AqnSwitch]:
        """Settings and switch of this worker; the first call installs the hardware."""
        state = self.__dict__.get("_roundoff_state")
        if state is None:
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
            state = (settings, switch)
            self.__dict__["_roundoff_state"] = state
        return state

    def update_weights_from_ipc(self, *args: Any, **options: Any) -> None:
        """Receive weights as verl does; AQN's noise is removed before, and drawn for the new weights after."""
        _, switch = self._roundoff()
        switch.before_sync()
        super().update_weights_from_ipc(*args, **options)
        switch.after_sync()

    def _update_weights(self, weights: list[tuple[str, Tensor]], peft_config: Any, base_sync_done: bool) -> None:
        """Load weights as verl does; base weights are quantized before, while adapters are not."""
        if not (peft_config and base_sync_done):
            hardware = self._roundoff()[0].hardware
            weights = [(name, quantized(name, tensor, hardware)) for name, tensor in weights]
        super()._update_weights(weights, peft_config, base_sync_done)

    def roundoff_announce(self, step: int, sigma: float) -> None:
        """Note the step and sigma that the next sync is for."""
        self._roundoff()[1].announce(step, sigma)

    def roundoff_evaluation(self, on: bool) -> None:
        """Begin or end an evaluation."""
        self._roundoff()[1].evaluation(on)

    def roundoff_report(self, fingerprint: str) -> None:
        """Compare this worker's settings with the trainer's; verl's server cannot return a result.

        Raises:
            ConfigError: if this worker computes on other hardware.
        """
        own = self._roundoff()[0].fingerprint
        if own != fingerprint:
            raise ConfigError(f"this vLLM worker has settings {own}, the trainer {fingerprint}")


def quantized(name: str, tensor: Shaped[Tensor, "*shape"], hardware: Hardware) -> Shaped[Tensor, "*shape"]:
    """Q(W) for the weight of a Linear that is on the hardware, else the tensor itself; `name` is Hugging Face's."""
    module, _, kind = plain_name(name).rpartition(".")
    layer = layer_index(module)
    fmt = hardware.precision.weight
    if fmt is None or kind != "weight" or tensor.dim() != 2 or layer is None or layer in hardware.precision.keep:
        return tensor
    return tensor if exclusion(module, hardware.exclude) else quantize(tensor, fmt)


def install_in_vllm(model: nn.Module, hardware: Hardware, key: Key) -> int:
    """Put vLLM's Linear layers on the hardware; returns their number.

    Raises:
        ConfigError: if a setting cannot be simulated in vLLM, or no layer is found.
    """
    from vllm.model_executor.layers.linear import LinearBase

    noise = hardware.matmul_noise
    std = noise.relative_std if noise.forward else 0.0
    refused = {
        "hardware.matmul_noise.attention = true": bool(std and noise.attention),
        "hardware.precision.attention": hardware.precision.attention is not None,
        "hardware.precision.kv_cache (vLLM's own kv_cache_dtype has other scales)": (
            hardware.precision.kv_cache is not None
        ),
        "hardware.deadzone": hardware.deadzone is not None,
        "hardware.faults": bool(hardware.faults),
        "hardware.exclude without lm_head": exclusion("lm_head", hardware.exclude) is None,
        "a mixture of experts": any(type(module).__name__.endswith("FusedMoE") for module in model.modules()),
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{setting} cannot be simulated in vLLM: change it, or use rollout.name=roundoff")
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) or _excluded(name, hardware):
            continue
        if getattr(module, "tp_size", 1) != 1:
            raise ConfigError("set actor_rollout_ref.rollout.tensor_model_parallel_size=1: noise needs whole products")
        if type(module.quant_method).__name__ != "UnquantizedLinearMethod":
            raise ConfigError(
                f"{name} is quantized by vLLM ({type(module.quant_method).__name__}): load unquantized weights"
            )
        kept = layer_index(name) in hardware.precision.keep
        fmt = None if kept else hardware.precision.activation
        module.quant_method = HardwareMethod(module.quant_method, fmt, std, key.fold(name))
        count += 1
    if not count:
        raise ConfigError("no Linear layer of vLLM's model is left for the hardware")
    return count


def _excluded(name: str, hardware: Hardware) -> bool:
    """Whether one of vLLM's layers is excluded from the hardware; a fused one is excluded as a whole or not at all."""
    parent, _, last = name.rpartition(".")
    names = [f"{parent}.{part}" for part in FUSED.get(last, (last,))]
    excluded = [exclusion(part, hardware.exclude) is not None for part in names]
    if any(excluded) != all(excluded):
        raise ConfigError(f"hardware.exclude takes out a part of {name}, which vLLM computes as one: exclude all of it")
    return excluded[0]
