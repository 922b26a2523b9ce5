"""What one run holds in memory: checked settings, model with its hardware, task, optimizer; saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.config import Algorithm, ConfigError, Experiment, Profile, learning_rate
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.checkpoint import Checkpoint, check_origin
from roundoff.runs.directory import RunDirectory
from roundoff.srdd import LayerScan, layer_multipliers
from roundoff.tasks import Task
from roundoff.training.batch import PromptStream
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.policy import (
    Policy,
    check_base,
    put_weights,
)


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
