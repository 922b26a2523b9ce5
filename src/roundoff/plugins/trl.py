"""AQN inside trl's `GRPOTrainer` (1.16): a callback that puts its noise on the model while rollouts are generated.

trl has no event around generation. It calls `generate` of the unwrapped model, the public method of transformers, for
rollouts and for nothing else; so the callback wraps that method of the one model object from the begin of training to
its end. A rollout is told from an evaluation by the model's mode, as trl itself does. The training passes and the
reference model call `forward`, which nobody touches.

Where trl generates otherwise (vLLM, continuous batching, a rollout function), the noise would never be in force: that
is an error, at the begin where the arguments tell, else after the first step. So are sharded weights, of which a
process sees only a part.

Hardware needs no callback: `install_in_trainer` puts policy and reference on it before `train()`, and every pass of
rollout, training and evaluation computes on it. Its noise is drawn anew in every pass, as on a chip (`ratio =
"recomputed"` in roundoff's words); trl's gradient checkpointing, which computes layers again, is refused with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from roundoff.aqn.noise import aqn_noise, aqn_targets
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import AQN, ConfigError, Hardware
from roundoff.hardware import InstalledHardware, install, installed, uninstall
from roundoff.numerics.rng import Key

_OTHER_GENERATORS = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")
"""Arguments of trl under which it does not call `generate`."""


class AqnCallback(TrainerCallback):
    """AQN in rollouts only, on the schedule of the settings over the trainer's optimizer steps."""

    def __init__(self, aqn: AQN, *, seed: int, multipliers: Mapping[int, float] | None = None) -> None:
        """Noise as `aqn` says, drawn by `seed`; `multipliers` are factors on sigma by decoder layer, as of a scan."""
        self.aqn = aqn
        self.multipliers = multipliers
        self.sigmas: dict[int, float] = {}
        """Sigma in force in the rollouts of each optimizer step so far (numbered from 1; 0.0 at silent steps)."""
        self._key = Key.from_seed(seed).fold("aqn")
        self._curve: list[float] = []
        self._step = 0
        self._calls = 0
        self._model: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wrap `generate`.

        Raises:
            ConfigError: if trl will not call it, the weights are sharded, or AQN cannot be applied to this model.
        """
        self._unwrap()  # where an exception ended the training before
        model = kwargs["model"]
        for name in _OTHER_GENERATORS:
            if getattr(args, name, False):
                raise ConfigError(f"{name} = True generates without model.generate, where AQN would never be in force")
        check_gradient_checkpointing(model)
        sharded = [target.name for target in aqn_targets(model, self.aqn) if not target.weight.numel()]
        if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
            raise ConfigError("the model's weights are sharded over processes, which AQN in trl does not support")
        if "generate" in vars(model):
            raise ConfigError("generate of this model is wrapped already: give the trainer one AqnCallback")
        per_epoch = _steps_per_epoch(args, state, kwargs.get("train_dataloader"))
        self._curve = sigma_curve(state.max_steps, per_epoch, self.aqn)
        self._model = model
        model.generate = self._wrapped(model, model.generate)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step that rollouts are for."""
        self._step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that there were rollouts; a step without any of its own trains on those of the step before.

        Raises:
            RuntimeError: if the trainer has taken a step without calling `generate` once.
        """
        if not self.sigmas:
            self._unwrap()
            raise RuntimeError(
                "the trainer took a step without calling model.generate in training mode, so AQN was never in force: "
                "it generates in another way (a rollout function?), which AqnCallback does not support"
            )
        self.sigmas.setdefault(self._step + 1, list(self.sigmas.values())[-1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the wrapper off."""
        self._unwrap()

    def _unwrap(self) -> None:
        if self._model is not None:
            vars(self._model).pop("generate", None)
            self._model = None

    def _wrapped(self, model: nn.Module, generate: Any) -> Any:
        def generate_with_noise(*inputs: Any, **named: Any) -> Any:
            if not model.training:  # an evaluation: a score must never carry the noise of a remedy
                return generate(*inputs, **named)
            sigma = self._curve[min(self._step, len(self._curve) - 1)]
            self.sigmas[self._step + 1] = sigma
            self._calls += 1
            if not sigma:
                return generate(*inputs, **named)
            with aqn_noise(model, sigma, self.multipliers, self._key.fold(self._step, self._calls), self.aqn):
                return generate(*inputs, **named)

        return generate_with_noise


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, batches: Sized | None) -> int:
    """Optimizer steps of an epoch, as the trainer counts them; `max_steps` overrides the number of epochs."""
    if args.max_steps <= 0:
        return max(1, round(state.max_steps / max(1.0, args.num_train_epochs)))
    try:
        count = 0 if batches is None else len(batches)
    except TypeError:  # data without a length have no epochs
        count = 0
    return max(1, -(-count // args.gradient_accumulation_steps)) if count else state.max_steps


def install_in_trainer(trainer: Any, hardware: Hardware, *, seed: int) -> InstalledHardware:
    """Put the policy of a `GRPOTrainer`, and its reference model if it has one, on the hardware, before `train()`.

    Adapters that the trainer has put on the model stay in high precision.

    Raises:
        ConfigError: if the hardware cannot be installed, or trl would compute a part past it.
    """
    found = install(trainer.model, hardware, seed=seed)
    if any(state.is_output for state in found.states):
        uninstall(trainer.model)
        raise ConfigError(
            "hardware.exclude leaves lm_head on the hardware, but trl computes log-probabilities past that module: "
            "exclude it"
        )
    if getattr(trainer, "ref_model", None) is not None:
        install(trainer.ref_model, hardware, seed=seed)
    return found


def check_gradient_checkpointing(model: nn.Module) -> None:
    """Check that no noisy layer is computed again in the backward pass, where it would meet other noise.

    Raises:
        ConfigError: if it would be; trl's default is to do so.
    """
    found = installed(model)
    if found is None or not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    noise = found.hardware.matmul_noise
    if found.hardware.is_noisy or (noise.relative_std and noise.backward):
        raise ConfigError(
            "gradient_checkpointing = True (trl's default) computes layers again under other noise than the first "
            "time: set gradient_checkpointing=False in GRPOConfig"
        )
