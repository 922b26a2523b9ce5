"""Effective settings, where one setting changes the meaning of another."""

from __future__ import annotations

from roundoff.config.algorithm import Algorithm
from roundoff.config.base import ConfigError
from roundoff.config.experiment import Experiment
from roundoff.config.profile import Profile, Training


def training_in_force(algorithm: Algorithm, training: Training) -> Training:
    """The profile's training settings after the algorithm's ratio has been taken into account.

    With `ratio = "one"`, each minibatch of the profile is sampled as a batch of its own, so that every optimizer step
    sees fresh rollouts. The run then takes `minibatches` times as many steps, with the same total number of prompts,
    optimizer steps and evaluations as under the other ratios.

    Raises:
        ConfigError: if the prompts of a step cannot be split into minibatches of equal size.
    """
    parts = training.minibatches
    if not algorithm.ratio_rule.splits_batches or parts == 1:
        return training
    if training.prompts_per_step % parts:
        raise ConfigError(
            f"algorithm.ratio = {algorithm.ratio!r} samples each minibatch separately, so "
            f"profile.training.prompts_per_step ({training.prompts_per_step}) must be a multiple of minibatches "
            f"({parts})"
        )
    longer = {name: getattr(training, name) * parts for name in ("evaluate_every", "checkpoint_every", "warmup_steps")}
    smaller = {"prompts_per_step": training.prompts_per_step // parts, "minibatches": 1}
    return training.model_copy(update={**longer, **smaller})


def steps_per_epoch(problems: int, algorithm: Algorithm, training: Training) -> int:
    """Steps in which every training problem is drawn once (nominally: dynamic sampling may draw more)."""
    return problems // (training_in_force(algorithm, training).prompts_per_step * algorithm.oversampling)


def learning_rate(experiment: Experiment, profile: Profile) -> float:
    """Learning rate after warm-up: `lora_learning_rate` if adapters are trained, else `learning_rate`."""
    training = profile.training
    return training.learning_rate if experiment.lora is None else training.lora_learning_rate
