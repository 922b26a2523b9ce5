"""What one run holds in memory: checked settings, the model on its hardware, the task, the optimizer.

`preparation` makes a session, `checks` holds what must be true before, and `saving` writes it to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.aqn.plan import AqnPlan
from roundoff.config import Algorithm, Experiment, Profile, learning_rate
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.srdd import LayerScan
from roundoff.tasks import Task
from roundoff.training.batch import PromptStream
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.policy import Policy


@dataclass
class Session:
    """Everything that one run holds in memory; only `position` and `fruitless_steps` change from step to step."""

    experiment: Experiment
    profile: Profile
    key: Key
    policy: Policy
    reference: PreTrainedModel | None
    """The model before training; None without a KL penalty, or where the policy has adapters to disable."""
    task: Task
    stream: PromptStream
    optimizer: MasterAdamW
    total_steps: int
    aqn: AqnPlan
    scan: LayerScan | None = None
    """The SRDD scan, where a setting refers to one."""
    problems: str = ""
    """SHA-256 over the task's problems as the model reads them, and over their answers."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint records of this run (`roundoff.runs.checkpoint.run_origin`)."""
    ranks: Ranks = ALONE
    """The processes that make this run together."""
    position: int = 0
    """Prompts drawn from the stream so far."""
    fruitless_steps: int = 0
    """Steps in a row, up to the last one, without a rollout that could be trained on."""

    @property
    def model(self) -> PreTrainedModel:
        """The model being trained."""
        return self.policy.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.policy.loaded.tokenizer

    @property
    def algorithm(self) -> Algorithm:
        """The objective's settings."""
        return self.experiment.algorithm

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up; adapters have one of their own."""
        return learning_rate(self.experiment, self.profile)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        return self.policy.trainable

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
