"""The scale of a run: model, task, batch sizes, lengths and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from roundoff.config.base import Count, Fraction, NonNegative, Positive, Settings, Whole, rule


class Training(Settings):
    """Batch sizes, lengths and the optimizer of a run."""

    prompts_per_step: Count
    minibatches: Count = 1
    """Optimizer steps in one pass over a batch of rollouts, each on its own part of it."""
    micro_batch: Whole = 0
    """Rollouts in one forward and backward pass (0: a whole minibatch). It changes memory use and float32 rounding, and
    the draws of backward noise on `dW` and the blocks of quantized gradients, because every pass computes a `dW` of its
    own."""
    gradient_checkpointing: bool = False
    """Whether each decoder layer is computed again in the backward pass: less memory, more time, the same bits."""
    learning_rate: Positive
    lora_learning_rate: Positive
    warmup_steps: Whole = 0
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    gradient_clip: Positive = 1.0
    max_prompt_tokens: Count
    max_new_tokens: Count
    long_prompts: Literal["error", "filter"] = "error"
    """What to do about training problems longer than `max_prompt_tokens`: stop with an error, or leave them out."""
    evaluate_every: Count
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    noise_draws: Count = 1
    """Number of noise draws over which a deployed score is averaged."""
    checkpoint_every: Count
    keep_checkpoints: Annotated[
        int, rule(lambda v: v >= 2, "must be at least 2, so that a run survives a damaged checkpoint")
    ] = 2


PATH_SETTINGS = {"gsm8k": ("path", "train", "test")}
"""Settings of the packaged tasks that are paths, by task name."""


class Task(Settings):
    """A task, by name, with the settings that the task itself defines and checks."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    directory: str | None = None
    """Base of the relative paths in `name` (`file.py:Class`) and `settings`: the directory of the TOML file that
    contains them, or None for the current directory. It is recorded with a run but does not enter its hash."""

    @model_serializer(mode="wrap")
    def _without_an_empty_directory(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if self.directory is None:
            content.pop("directory", None)
        return content

    def located(self) -> Task:
        """The same task with absolute paths."""
        start = Path.cwd() if self.directory is None else Path(self.directory)
        name, settings = with_paths(self.name, self.settings, lambda path: str(start / path))
        return Task(name=name, settings=settings)


def with_paths(name: str, settings: Mapping[str, Any], change: Callable[[Path], str]) -> tuple[str, dict[str, Any]]:
    """The name and settings of a task, with every relative path in them replaced by `change(path)`."""

    def changed(path: str) -> str:
        return path if Path(path).expanduser().is_absolute() else change(Path(path))

    file, colon, attribute = name.rpartition(":")
    changed_name = f"{changed(file)}:{attribute}" if colon and file.endswith(".py") else name
    paths = {key: settings.get(key) for key in PATH_SETTINGS.get(name, ())}
    changed_paths = {key: changed(path) for key, path in paths.items() if path and isinstance(path, str)}
    return changed_name, {**settings, **changed_paths}


class Profile(Settings):
    """The scale of a run: model, task, batch sizes, lengths and learning rates."""

    name: str
    title: str = ""
    model: str
    """`tiny` or `tiny-long`, a local directory, or the name of a model on the Hugging Face hub."""
    allow_download: bool = False
    """Whether `model` may be downloaded from the hub; nothing else is ever downloaded."""
    chat: Literal["auto"] | bool = "auto"
    """Whether prompts go through the tokenizer's chat template; `auto` uses it where both model and task have one."""
    task: Task
    training: Training
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "cpu"
    threads: Count = 1
    """CPU threads of one run; the bits of a result depend on it."""
