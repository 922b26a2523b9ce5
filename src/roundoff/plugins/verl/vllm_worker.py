"""The hardware in vLLM's workers. It was written from the sources of verl 0.9.1 and NEVER RUN, for want of a GPU.

With `rollout.engine_kwargs.vllm.worker_extension_cls`, verl gives vLLM's worker a base class from here. It

- quantizes each Linear weight when it arrives, by its Hugging Face name and before vLLM fuses q, k and v or gate and
  up, so that scales are those of roundoff's own pass;
- wraps the method by which each of vLLM's Linear layers computes its product, to quantize the input and perturb the
  output before the bias is added, as the phase asks: that of rollouts, and that of evaluation while verl evaluates;
- draws AQN's noise on the norms after each weight sync, and removes it for evaluations (`AqnSwitch`).

It refuses what it cannot do: other weights in evaluation than in rollouts, noise on attention and accumulators (which
are inside vLLM's kernels), errors besides the published noise, deadzones and faults (`vllm_limits`); settings that
differ within what vLLM computes as one product (`vllm_plan`); experts, tensor parallelism (noise belongs on the whole
product, not on one rank's part of the sum), compiled graphs, and weights that vLLM itself has quantized. The plan and
the limits are tested without vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from roundoff.config import ConfigError, Hardware, Phase
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from roundoff.plugins.verl.aqn_switch import AqnSwitch
from roundoff.plugins.verl.settings import PluginSettings, from_environment
from roundoff.plugins.verl.vllm_plan import LayerArithmetic, VllmPlan, plan


@dataclass
class HardwareMethod:
    """Replacement for a Linear layer's `quant_method`: the same product with quantized input and noisy output."""

    inner: Any
    """vLLM's own method."""
    arithmetic: Mapping[Phase, LayerArithmetic]
    """What is simulated in each phase."""
    phase: Callable[[], Phase]
    """Tells the phase that is in force."""
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
        here = self.arithmetic[self.phase()]
        if here.activation is not None:
            x = quantize(x, here.activation, tensor_scale="row")
        y: Tensor = self.inner.apply(layer, x, None)
        if here.relative_std:
            matmul_noise(y, here.relative_std, self.key.fold(self.calls), out=y)
            self.calls += 1
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of vLLM's method."""
        return getattr(self.inner, name)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker has found in its settings and put on its model."""

    settings: PluginSettings
    """The settings of the run."""
    switch: AqnSwitch
    """AQN, and whether verl is evaluating."""
    plan: VllmPlan | None
    """What each layer computes; None: plain arithmetic in rollouts and evaluation."""


class HardwareWorker(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl's extension of vLLM's worker, on simulated hardware."""

    def _roundoff(self) -> WorkerState:
        """The state of this worker; the first call installs the hardware."""
        state: WorkerState | None = self.__dict__.get("_roundoff_state")
        if state is None:
            settings = from_environment(os.environ)
            if settings is None:
                raise ConfigError("this vLLM worker has no ROUNDOFF_VERL_SETTINGS: forward it to every process")
            model = self.model_runner.model
            if not self.model_runner.vllm_config.model_config.enforce_eager:
                raise ConfigError("compiled graphs would not see the hardware: set rollout.enforce_eager=True")
            switch = AqnSwitch(model, settings.aqn, Key.from_seed(settings.seed), settings.multipliers)
            hardware, found = settings.rollout_hardware, None
            if not hardware.changes_nothing:
                replica = int(os.environ.get("VERL_REPLICA_RANK", "0"))
                key = Key.from_seed(settings.seed).fold("vllm rollout", replica)
                found = install_in_vllm(model, hardware, key, lambda: switch.phase)
            state = WorkerState(settings, switch, found)
            self.__dict__["_roundoff_state"] = state
        return state

    def update_weights_from_ipc(self, *args: Any, **options: Any) -> None:
        """Receive weights as verl does; AQN's noise is removed before, and drawn for the new weights after."""
        switch = self._roundoff().switch
        switch.before_sync()
        super().update_weights_from_ipc(*args, **options)
        switch.after_sync()

    def _update_weights(self, weights: list[tuple[str, Tensor]], peft_config: Any, base_sync_done: bool) -> None:
        """Load weights as verl does; base weights are quantized before, while adapters are not."""
        found = self._roundoff().plan
        if found is not None and not (peft_config and base_sync_done):
            weights = [(name, quantized(name, tensor, found)) for name, tensor in weights]
        super()._update_weights(weights, peft_config, base_sync_done)

    def roundoff_announce(self, step: int, sigma: float) -> None:
        """Note the step and sigma that the next sync is for."""
        self._roundoff().switch.announce(step, sigma)

    def roundoff_evaluation(self, on: bool) -> None:
        """Begin or end an evaluation, which is sampled without AQN's noise and on the hardware of evaluation."""
        self._roundoff().switch.evaluation(on)

    def roundoff_report(self, fingerprint: str) -> None:
        """Compare this worker's settings with the trainer's; verl's server cannot return a result.

        Raises:
            ConfigError: if this worker computes on other hardware.
        """
        own = self._roundoff().settings.fingerprint
        if own != fingerprint:
            raise ConfigError(f"this vLLM worker has settings {own}, the trainer {fingerprint}")


def quantized(name: str, tensor: Shaped[Tensor, "*shape"], plan: VllmPlan) -> Shaped[Tensor, "*shape"]:
    """Q(W) for the weight of a Linear that is on the hardware, else the tensor itself; `name` is Hugging Face's."""
    fmt = plan.weight_format(name) if tensor.dim() == 2 else None
    return tensor if fmt is None else quantize(tensor, fmt)


def install_in_vllm(model: nn.Module, hardware: Hardware, key: Key, phase: Callable[[], Phase]) -> VllmPlan:
    """Put vLLM's Linear layers on the hardware of rollouts and evaluation; returns what each of them computes.

    Args:
        model: vLLM's model.
        hardware: the settings.
        key: key of this worker's noise.
        phase: tells the phase that is in force.

    Raises:
        ConfigError: if a setting cannot be simulated in vLLM, or no layer is found.
    """
    from vllm.model_executor.layers.linear import LinearBase

    if any(type(module).__name__.endswith("FusedMoE") for module in model.modules()):
        raise ConfigError(
            "a mixture of experts cannot be simulated in vLLM: use another model, or rollout.name=roundoff"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LinearBase)}
    found = plan(hardware, linears)
    for name, arithmetic in found.layers.items():
        module = linears[name]
        if getattr(module, "tp_size", 1) != 1:
            raise ConfigError("set actor_rollout_ref.rollout.tensor_model_parallel_size=1: noise needs whole products")
        if type(module.quant_method).__name__ != "UnquantizedLinearMethod":
            raise ConfigError(
                f"{name} is quantized by vLLM ({type(module.quant_method).__name__}): load unquantized weights"
            )
        module.quant_method = HardwareMethod(module.quant_method, arithmetic, phase, key.fold(name))
    return found
