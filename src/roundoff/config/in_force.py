"""Settings as they are in force, where one setting decides how another is taken."""

from __future__ import annotations

from roundoff.config.algorithm import Algorithm
from roundoff.config.base import ConfigError
from roundoff.config.experiment import Experiment
from roundoff.config.profile import Profile, Training


def training_in_force(algorithm: Algorithm, training: Training) -> Training:
    """The profile's training as the objective takes it.

    With `ratio = "one"` each minibatch of the profile is sampled as a batch of its own, so that every optimizer step
    has fresh rollouts: as many prompts, optimizer steps and evaluations as with the other ratios, in `minibatches`
    times as many steps.

    Raises:
        ConfigError: if the minibatches are not of one size.
    """
    parts = training.minibatches
    if not algorithm.ratio_rule.splits_batches or parts == 1:
        return training
    if training.prompts_per_step % parts:
        raise ConfigError(
            f"algorithm.ratio = {algorithm.ratio!r} samples each minibatch apart, so profile.training.prompts_per_step "
            f"({training.prompts_per_step}) must be a multiple of minibatches ({parts})"
        )
    longer = {name: getattr(training, name) * parts for name in ("evaluate_every", "checkpoint_every", "warmup_steps")}
    smaller = {"prompts_per_step": training.prompts_per_step // parts, "minibatches": 1}
    return training.model_copy(update={**longer, **smaller})


def steps_per_epoch(problems: int, algorithm: Algorithm, training: Training) -> int:
    """Steps in which all training problems are drawn once (nominally: dynamic sampling may draw more)."""
    return problems // (training_in_force(algorithm, training).prompts_per_step * algorithm.oversampling)


def learning_rate(experiment: Experiment, profile: Profile) -> float:
    """The learning rate after warm-up: `lora_learning_rate` for adapters."""
    training = profile.training
    return training.learning_rate if experiment.lora is None else training.lora_learning_rate
