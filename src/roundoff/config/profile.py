"""How big a run is: model, task, batch sizes, lengths and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

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


PATH_SETTINGS = {"gsm8k": ("path", "train", "test")}
"""Settings of packaged tasks that name files."""


class Task(Settings):
    """A task by name, with the settings that the task itself defines and checks."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    directory: str | None = None
    """Where relative paths in `name` (`file.py:Class`) and `settings` begin: the directory of the TOML file that gives
    them; None: where the process was started. It is recorded with a run, but is no part of its hash."""

    @model_serializer(mode="wrap")
    def _without_an_empty_directory(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.directory is None:
            content.pop("directory", None)
        return content

    def located(self) -> Task:
        """The same task, with absolute paths."""
        start = Path.cwd() if self.directory is None else Path(self.directory)
        name, settings = with_paths(self.name, self.settings, lambda path: str(start / path))
        return Task(name=name, settings=settings)


def with_paths(name: str, settings: Mapping[str, Any], change: Callable[[Path], str]) -> tuple[str, dict[str, Any]]:
    """Name and settings of a task, each relative path in them replaced by what `change` makes of it."""

    def changed(path: str) -> str:
        return path if Path(path).expanduser().is_absolute() else change(Path(path))

    where, colon, attribute = name.rpartition(":")
    placed = f"{changed(where)}:{attribute}" if colon and where.endswith(".py") else name
    given = {key: settings.get(key) for key in PATH_SETTINGS.get(name, ())}
    return placed, {**settings, **{key: changed(path) for key, path in given.items() if path and isinstance(path, str)}}


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
