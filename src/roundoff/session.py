"""What one run holds in memory: checked settings, model with its hardware, task, optimizer; saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.algorithms.schedule import sigma_curve
from roundoff.aqn import check_multipliers
from roundoff.batch import PromptStream
from roundoff.checkpoint import Checkpoint, check_origin, run_origin
from roundoff.config import Algorithm, ConfigError, Experiment, Profile
from roundoff.models.checkpointing import check_layers
from roundoff.numerics.rng import Key
from roundoff.optimizer import MasterAdamW
from roundoff.parallel import ALONE, Ranks
from roundoff.policy import Policy, check_base, install_plain, load_plain, load_policy, make_policy, put_weights
from roundoff.prerequisites import (
    check_enough,
    check_prompts,
    check_room,
    check_settings,
    make_task,
    resolve_device,
    steps_per_epoch,
    training_in_force,
    within_length,
)
from roundoff.run_dir import RunDirectory
from roundoff.srdd import LayerScan, experiment_scan, layer_multipliers
from roundoff.tasks import Task

__all__ = [
    "Policy",
    "Session",
    "check_prompts",
    "check_room",
    "check_settings",
    "learning_rate",
    "load_policy",
    "make_task",
    "prepare",
    "put_weights",
    "resolve_device",
    "restore",
    "save",
    "steps_per_epoch",
    "training_in_force",
]


@dataclass
class Session:
    """Everything that one run holds in memory."""

    experiment: Experiment
    profile: Profile
    key: Key
    policy: Policy
    reference: PreTrainedModel | None
    """The model before training; None without a KL penalty, or where the policy has adapters to disable."""
    task: Task
    stream: PromptStream
    optimizer: MasterAdamW
    sigmas: list[float]
    """AQN's sigma of each step (zero throughout without AQN)."""
    scan: LayerScan | None = None
    """The SRDD scan, where a setting refers to one."""
    problems: str = ""
    """SHA-256 over the task's problems as they are asked, and their answers."""
    position: int = 0
    """Prompts drawn from the stream so far."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint records of this run (`checkpoint.run_origin`)."""
    fruitless_steps: int = 0
    """Steps in a row, up to the last one, without a rollout that could be trained on."""
    ranks: Ranks = ALONE
    """The processes that make this run together."""

    @property
    def model(self) -> PreTrainedModel:
        """The model being trained."""
        return self.policy.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        return self.policy.loaded.tokenizer

    @property
    def algorithm(self) -> Algorithm:
        """The objective."""
        return self.experiment.algorithm

    @property
    def learning_rate(self) -> float:
        """Of this run after warm-up: adapters have their own."""
        return learning_rate(self.experiment, self.profile)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the optimizer moves, by name."""
        return self.policy.trainable

    def multipliers(self, step: int) -> dict[int, float] | None:
        """Factors on AQN's sigma by decoder layer at a step (numbered from 1); None where every layer has the same."""
        return layer_multipliers(self.experiment, self.scan, (step - 1) / len(self.sigmas))

    @contextmanager
    def reference_policy(self) -> Iterator[PreTrainedModel | None]:
        """The policy before training, on the same hardware; None if the objective has no use for it."""
        if self.algorithm.kl_coefficient == 0:
            yield None
        elif self.policy.adapters is not None:
            with self.policy.adapters.disabled():
                yield self.model
        else:
            yield self.reference


def prepare(experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None) -> Session:
    """Check everything that can be checked, then load the model, scan it where needed, and install the hardware.

    `scan` is the one that the run already rests on, if any.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    task = check_settings(experiment, profile)
    given, algorithm = profile.training, experiment.algorithm
    training, origin = training_in_force(algorithm, given), run_origin(experiment, profile, seed)
    profile = profile.model_copy(update={"training": training})
    offered = task.train()
    key = Key.from_seed(seed)
    loaded = load_plain(profile)
    asked = check_prompts(loaded, (*offered, *task.test()))
    problems, lengths = within_length(offered, loaded, profile)
    check_enough(len(problems), "only {} training prompts are within max_prompt_tokens", algorithm, training)
    check_room(loaded, task.test(), training, lengths)
    if scan is None and experiment.needs_scan:
        scan = experiment_scan(experiment, loaded, task, seed)
    policy = make_policy(experiment, loaded, seed, scan)
    if training.gradient_checkpointing:
        check_layers(policy.model)
    per_epoch = steps_per_epoch(len(problems), algorithm, given)
    total = experiment.epochs * per_epoch
    sigmas = sigma_curve(total, per_epoch, experiment.aqn) if experiment.aqn else [0.0] * total
    reference = None
    if algorithm.kl_coefficient > 0 and policy.adapters is None:
        reference = load_plain(profile).model
        install_plain(experiment, reference, seed, scan)
        reference.requires_grad_(False)
    optimizer = MasterAdamW(policy.trainable, learning_rate(experiment, profile), training)
    stream = PromptStream(problems, key.fold("data"))
    session = Session(
        experiment, profile, key, policy, reference, task, stream, optimizer, sigmas, scan, asked, origin=origin
    )
    if experiment.aqn is not None:
        for step in (1, total):
            check_multipliers(session.model, experiment.aqn, session.multipliers(step))
    return session


def learning_rate(experiment: Experiment, profile: Profile) -> float:
    """The learning rate after warm-up: `lora_learning_rate` for adapters."""
    training = profile.training
    return training.learning_rate if experiment.lora is None else training.lora_learning_rate


def save(session: Session, run_dir: RunDirectory, step: int) -> None:
    """Checkpoint everything that the next step depends on: weights, optimizer, place in the prompt stream."""
    trained = session.trainable
    tensors = {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": session.optimizer.tensors()}
    state: dict[str, Any] = {"position": session.position, "base": session.policy.base, "problems": session.problems}
    state["run"] = session.origin
    run_dir.save_checkpoint(step, tensors, state, keep=session.profile.training.keep_checkpoints)


def restore(session: Session, checkpoint: Checkpoint) -> int:
    """Put a checkpoint's content in place, bit for bit; returns its step.

    Raises:
        ConfigError: if the profile's model or the task's problems have changed since the run began, or another run
            wrote the checkpoint.
        DamagedCheckpointError: if the checkpoint holds the weights of another model.
    """
    check_origin(checkpoint, session.origin, session.experiment.id)
    check_base(session.policy, checkpoint)
    if checkpoint.step > len(session.sigmas):
        raise ConfigError(
            f"there is a checkpoint of step {checkpoint.step}, but this run has {len(session.sigmas)} steps: another "
            "run wrote it; remove it from this run's checkpoints/"
        )
    if checkpoint.state.get("problems", session.problems) != session.problems:
        raise ConfigError(
            f"the problems of task {session.task.name!r}, or how they are asked, have changed since this run began: "
            "bring the old data back to go on, or move the run's directory away to begin again"
        )
    put_weights(session.policy, checkpoint)
    session.optimizer.put(checkpoint.tensors["optimizer"])
    session.position = checkpoint.state["position"]
    return checkpoint.step
