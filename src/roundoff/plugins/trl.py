"""Hardware and AQN inside trl's `GRPOTrainer` (1.16).

`install_in_trainer` puts policy and reference on the hardware before `train()`, and every pass computes on it. Its
noise is drawn anew in every pass, as on a chip (roundoff's `ratio = "recomputed"`). trl's gradient checkpointing, which
computes layers twice, is refused together with noise in training.

`AqnCallback` puts AQN's noise on the model while rollouts are generated.

trl has no event around generation. For rollouts and for the scores of an evaluation, and for nothing else, it calls
`generate` of the unwrapped model, the public method of transformers. Where phases differ in hardware, and for AQN, that
method of the model object is enclosed in blocks (`roundoff.plugins.generation`): for AQN from the beginning of training
to its end, for phases as long as the hardware is installed. Rollouts are told from evaluations by the model's mode, as
in trl itself. Training passes, old log-probabilities and the reference model call `forward`, which is left alone and
computes on the hardware of training.

If trl generates in another way (vLLM, continuous batching, a rollout function), no block would ever be in force. That
is an error: at the beginning if the trainer shows it, otherwise after the first step. Under AQN sharded weights, of
which each process sees only a part, are an error as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from roundoff.aqn.noise import aqn_noise, aqn_targets
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import AQN, ConfigError, Hardware
from roundoff.hardware import InstalledHardware, hardware_phase, install, installed, uninstall
from roundoff.numerics.rng import Key
from roundoff.plugins.generation import enclose, enclosed, release

_OTHER_GENERATORS = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")
"""Arguments of trl under which it does not call `generate`."""


class AqnCallback(TrainerCallback):
    """AQN in rollouts only, on the schedule of the settings over the trainer's optimizer steps."""

    def __init__(self, aqn: AQN, *, seed: int, multipliers: Mapping[int, float] | None = None) -> None:
        """A callback for one trainer.

        Args:
            aqn: schedule and targets of the noise.
            seed: seed of its draws.
            multipliers: factors on sigma by decoder layer, such as those of a scan; None: 1 in every layer.
        """
        self.aqn = aqn
        self.multipliers = multipliers
        self.sigmas: dict[int, float] = {}
        """Sigma in the rollouts of each optimizer step so far (steps count from 1; 0.0 in steps without noise)."""
        self._key = Key.from_seed(seed).fold("aqn")
        self._curve: list[float] = []
        self._step = 0
        self._calls = 0
        self._model: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wrap the model's `generate`; trl calls this before the first step.

        Raises:
            ConfigError: if trl will not call `generate`, the weights are sharded, or AQN cannot be applied to this
                model.
        """
        self._unwrap()  # in case an exception ended an earlier training
        model = kwargs["model"]
        _check_generator(args, "where AQN would never be in force")
        check_gradient_checkpointing(model)
        sharded = [target.name for target in aqn_targets(model, self.aqn) if not target.weight.numel()]
        if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
            raise ConfigError("the model's weights are sharded over processes, which AQN in trl does not support")
        per_epoch = _steps_per_epoch(args, state, kwargs.get("train_dataloader"))
        self._curve = sigma_curve(state.max_steps, per_epoch, self.aqn)
        enclose(model, "AqnCallback", self._noise)
        self._model = model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step whose rollouts are generated next; trl calls this before each step."""
        self._step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that there were rollouts; trl calls this after each step.

        A step without rollouts of its own trains on those of the step before, so it has the same sigma.

        Raises:
            RuntimeError: if the trainer has taken a step without ever calling `generate`.
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
        """Remove the wrapper; trl calls this after the last step."""
        self._unwrap()

    def _unwrap(self) -> None:
        if self._model is not None:
            release(self._model, "AqnCallback")
            self._model = None

    def _noise(self, model: nn.Module) -> AbstractContextManager[None]:
        """The block of one call of `generate`: noise in a rollout of a step that has some."""
        if not model.training:  # an evaluation, whose score must never contain a remedy's noise
            return nullcontext()
        sigma = self._curve[min(self._step, len(self._curve) - 1)]
        self.sigmas[self._step + 1] = sigma
        self._calls += 1
        if not sigma:
            return nullcontext()
        return aqn_noise(model, sigma, self.multipliers, self._key.fold(self._step, self._calls), self.aqn)


class PhaseCallback(TrainerCallback):
    """Generates on the hardware of rollouts and of evaluation; `install_in_trainer` adds it where phases differ."""

    def __init__(self) -> None:
        self.rollouts = 0
        """Calls of `generate` in training mode since the beginning of training."""

    def block(self, model: nn.Module) -> AbstractContextManager[None]:
        """The block of one call of `generate`."""
        self.rollouts += model.training
        return hardware_phase(model, "rollout" if model.training else "evaluation")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that trl will call `generate`, and begin to count; trl calls this before the first step.

        Raises:
            ConfigError: if it will not.
        """
        _check_generator(args, "where hardware.rollout would never be in force")
        self.rollouts = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that there were rollouts; trl calls this after each step.

        Raises:
            RuntimeError: if the trainer has taken a step without ever calling `generate`.
        """
        if not self.rollouts:
            raise RuntimeError(
                "the trainer took a step without calling model.generate in training mode, so hardware.rollout was "
                "never in force: it generates in another way, which phases do not support"
            )


def _check_generator(args: Any, consequence: str) -> None:
    """Refuse arguments of trl under which it does not call `generate`.

    Raises:
        ConfigError: naming the argument.
    """
    for name in _OTHER_GENERATORS:
        if getattr(args, name, False):
            raise ConfigError(f"{name} = True generates without model.generate, {consequence}")


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, batches: Sized | None) -> int:
    """Optimizer steps of an epoch, as the trainer counts them; `args.max_steps` overrides the number of epochs."""
    if args.max_steps <= 0:
        return max(1, round(state.max_steps / max(1.0, args.num_train_epochs)))
    try:
        count = 0 if batches is None else len(batches)
    except TypeError:  # data without a length have no epochs
        count = 0
    return max(1, -(-count // args.gradient_accumulation_steps)) if count else state.max_steps


def install_in_trainer(trainer: Any, hardware: Hardware, *, seed: int) -> InstalledHardware:
    """Put the policy of a `GRPOTrainer`, and its reference model if it has one, on the hardware.

    Call it before `train()`. Adapters that the trainer has put on the model stay in high precision, unless
    `hardware.lora` says otherwise. Where phases differ (`hardware.rollout` and so on), rollouts and evaluations are
    generated on their own hardware, and every other pass, that of `eval_loss` included, computes on that of training.

    Args:
        trainer: the `GRPOTrainer`.
        hardware: what to simulate.
        seed: seed of noise and faults.

    Raises:
        ConfigError: if the hardware cannot be installed, if trl would compute a part of the model without it, or if
            phases differ and trl would not generate by the model's own `generate`.
    """
    if getattr(getattr(trainer, "args", None), "use_vllm", False):
        raise ConfigError("use_vllm = True generates in vLLM, which computes without the hardware: set it to False")
    if hardware.has_phases:
        _check_generator(trainer.args, "where hardware.rollout would never be in force")
        if getattr(trainer, "rollout_func", None) is not None:
            raise ConfigError(
                "rollout_func generates in a way of its own, which phases do not support: leave it out, or give "
                "rollout, training and evaluation the same hardware"
            )
        enclosed(trainer.model)  # whatever else replaced generate is refused before anything is installed
    policy = install(trainer.model, hardware, seed=seed)
    if any(state.is_output for state in policy.current_states()):
        uninstall(trainer.model)
        raise ConfigError(
            "hardware.exclude leaves lm_head on the hardware, but trl computes log-probabilities past that module: "
            "exclude it"
        )
    if getattr(trainer, "ref_model", None) is not None:
        try:
            install(trainer.ref_model, hardware, seed=seed)
        except ConfigError:
            uninstall(trainer.model)
            raise
    _leave_phases(trainer)  # those of hardware that was uninstalled by itself
    if hardware.has_phases:
        callback = PhaseCallback()
        enclose(trainer.model, "PhaseCallback", callback.block)
        trainer.add_callback(callback)
    return policy


def uninstall_from_trainer(trainer: Any) -> None:
    """Undo `install_in_trainer`: policy and reference compute in plain arithmetic again, by their own `generate`.

    Raises:
        ConfigError: if no hardware is installed.
    """
    uninstall(trainer.model)
    if getattr(trainer, "ref_model", None) is not None:
        uninstall(trainer.ref_model)
    _leave_phases(trainer)


def _leave_phases(trainer: Any) -> None:
    if release(trainer.model, "PhaseCallback"):
        trainer.remove_callback(PhaseCallback)


def check_gradient_checkpointing(model: nn.Module) -> None:
    """Refuse gradient checkpointing together with noise in training: layers computed again would get another draw.

    Raises:
        ConfigError: if the model has both; gradient checkpointing is on by default in trl.
    """
    on_model = installed(model)
    if on_model is None or not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    if on_model.hardware.of("training").draws_in_training:
        raise ConfigError(
            "gradient_checkpointing = True (trl's default) computes layers again under other noise than the first "
            "time: set gradient_checkpointing=False in GRPOConfig"
        )
