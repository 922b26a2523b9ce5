"""What must hold before a run's first step: enough problems, prompts that the model can read, a device that exists.

All of it is checked before hardware is installed or anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedModel

from roundoff.config import Algorithm, ConfigError, Experiment, Hardware, Profile, Training, training_in_force
from roundoff.hardware import surveys
from roundoff.models.device import resolve_device
from roundoff.models.load import LoadedModel, check_model
from roundoff.models.prompts import check_asked, text
from roundoff.srdd import kept_count
from roundoff.tasks import Problem, Task, make_task


def check_settings(experiment: Experiment, profile: Profile) -> Task:
    """Check everything that can be checked without weights, and is the same for every seed. Returns the task.

    Raises:
        ConfigError: naming the setting that cannot be used.
        ModelError: if the profile's model is not there.
    """
    written, algorithm = profile.training, experiment.algorithm
    if written.minibatches > written.prompts_per_step:
        raise ConfigError(
            f"profile.training.minibatches must be at most prompts_per_step ({written.prompts_per_step}), "
            f"but is {written.minibatches}"
        )
    training = training_in_force(algorithm, written)
    task = make_task(profile)
    check_enough(len(task.train()), "the task has only {} training problems", algorithm, training)
    if not task.test():
        raise ConfigError(f"task {task.name!r} has no test problems")
    resolve_device(profile.device)
    check_model(profile.model, allow_download=profile.allow_download)
    return task


def check_hardware(hardware: Hardware, model: PreTrainedModel) -> None:
    """Check that every setting of the hardware reaches a module of the model, which needs no weights (`skeleton`).

    What depends on weights, dtype or adapters is found by
    `hardware.install` alone.

    Raises:
        ConfigError: naming the setting that reaches nothing.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)

    def chosen(keep: tuple[int, ...] | str) -> tuple[int, ...]:
        if not isinstance(keep, str):
            return keep
        kept_count(keep, layers)
        return ()

    surveys(model, hardware.with_keep(chosen))


def check_prompts(loaded: LoadedModel, problems: Sequence[Problem]) -> tuple[str, list[int]]:
    """Check that the model can be asked every problem.

    Returns:
        SHA-256 over the problems as the model reads them and over their answers, and the length of each prompt
        (tokens).

    Raises:
        ModelError: if the tokenizer would lose a part of a problem, or the chat template refuses one (`check_asked`).
    """
    prompts = [text(loaded.tokenizer, problem) for problem in problems]
    lengths = [len(tokens) for tokens in check_asked(loaded, problems)]
    lines = (f"{problem.id}\x1f{shown}\x1f{problem.answer}\n" for problem, shown in zip(problems, prompts, strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest(), lengths


def within_length(lengths: Sequence[int], training: Training) -> list[int]:
    """Indices of the training prompts that fit, given the length of each (tokens).

    Raises:
        ConfigError: if one does not fit and `long_prompts` is "error".
    """
    limit = training.max_prompt_tokens
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    if len(kept) < len(lengths) and training.long_prompts == "error":
        raise ConfigError(
            f"profile.training.max_prompt_tokens is {limit}, but {len(lengths) - len(kept)} training prompts are "
            f"longer (up to {max(lengths)} tokens): raise it, or set long_prompts = 'filter'"
        )
    return kept


def check_enough(count: int, sentence: str, algorithm: Algorithm, training: Training) -> None:
    """Check that `count` problems fill one batch; `sentence` says how many there are.

    Raises:
        ConfigError: if they do not.
    """
    if count < training.prompts_per_step * algorithm.oversampling:
        factor = f" with algorithm.oversampling = {algorithm.oversampling}" if algorithm.oversampling > 1 else ""
        raise ConfigError(
            f"profile.training.prompts_per_step is {training.prompts_per_step}{factor}, but {sentence.format(count)}"
        )
