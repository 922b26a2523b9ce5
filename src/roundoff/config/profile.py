"""How big a run is: model, task, batch sizes, lengths and the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from roundoff.config.base import Count, Fraction, NonNegative, Positive, Settings, Whole, rule


class Training(Settings):
    """Batch sizes, lengths and the optimizer: how big one run is."""

    prompts_per_step: Count
    minibatches: Count = 1
    """Optimizer steps on each batch of rollouts."""
    micro_batch: Whole = 0
    """Rollouts in one forward and backward pass (0: a whole minibatch); changes memory, float32 rounding, and, as each
    pass makes products of its own, the draws of backward noise on `dW`."""
    gradient_checkpointing: bool = False
    """Compute each decoder layer again in the backward pass; less memory, more time, the same bits."""
    learning_rate: Positive
    lora_learning_rate: Positive
    warmup_steps: Whole = 0
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    gradient_clip: Positive = 1.0
    max_prompt_tokens: Count
    max_new_tokens: Count
    long_prompts: Literal["error", "filter"] = "error"
    """What to do with a training problem longer than `max_prompt_tokens`."""
    evaluate_every: Count
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    noise_draws: Count = 1
    """Noise draws over which a deployed score is averaged."""
    checkpoint_every: Count
    keep_checkpoints: Annotated[
        int, rule(lambda v: v >= 2, "must be at least 2, so that a damaged one can be survived")
    ] = 2


class Task(Settings):
    """A task by name, with the settings that the task itself defines and checks."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Profile(Settings):
    """A scale: model, task, batch sizes, lengths, learning rates."""

    name: str
    title: str = ""
    model: str
    """`tiny`, a local directory, or a hub name."""
    allow_download: bool = False
    """Whether a hub name may be fetched from the hub; nothing else is ever downloaded."""
    chat: Literal["auto"] | bool = "auto"
    """Whether problems are asked through the tokenizer's chat template. `auto`: where both model and task have one."""
    task: Task
    training: Training
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "cpu"
    threads: Count = 1
    """CPU threads of one run; part of what fixes its bits."""
