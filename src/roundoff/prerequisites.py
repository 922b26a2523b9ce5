"""What must hold before a run's first step: enough problems, prompts that the model can read, a device that is there.

All of it is checked before hardware is installed or anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from roundoff.config import Algorithm, ConfigError, Experiment, Profile, Training
from roundoff.models.load import LoadedModel, check_model
from roundoff.prompts import check_asked, encode, text
from roundoff.sampler import check_sampling
from roundoff.tasks import Problem, Task, load_task


def training_in_force(algorithm: Algorithm, training: Training) -> Training:
    """The profile's training as the objective takes it.

    With `ratio = "one"` each minibatch of the profile is sampled as a batch of its own, so that every optimizer step
    has fresh rollouts: as many prompts, optimizer steps and evaluations as with the other ratios, in `minibatches`
    times as many steps.

    Raises:
        ConfigError: if the minibatches are not of one size.
    """
    parts = training.minibatches
    if algorithm.ratio != "one" or parts == 1:
        return training
    if training.prompts_per_step % parts:
        raise ConfigError(
            f"algorithm.ratio = 'one' samples each minibatch apart, so profile.training.prompts_per_step "
            f"({training.prompts_per_step}) must be a multiple of minibatches ({parts})"
        )
    longer = {name: getattr(training, name) * parts for name in ("evaluate_every", "checkpoint_every", "warmup_steps")}
    smaller = {"prompts_per_step": training.prompts_per_step // parts, "minibatches": 1}
    return training.model_copy(update={**longer, **smaller})


def steps_per_epoch(problems: int, algorithm: Algorithm, training: Training) -> int:
    """Steps in which all training problems are drawn once (nominally: dynamic sampling may draw more)."""
    return problems // (training_in_force(algorithm, training).prompts_per_step * algorithm.oversampling)


def check_settings(experiment: Experiment, profile: Profile) -> Task:
    """Check everything that can be checked without weights, which is the same for every seed; returns the task.

    Raises:
        ConfigError: naming the setting that cannot be used.
        ModelError: if the profile's model is not there.
    """
    given, algorithm = profile.training, experiment.algorithm
    if given.minibatches > given.prompts_per_step:
        raise ConfigError(
            f"profile.training.minibatches must be at most prompts_per_step ({given.prompts_per_step}), "
            f"but is {given.minibatches}"
        )
    training = training_in_force(algorithm, given)
    task = make_task(profile)
    check_enough(len(task.train()), "the task has only {} training problems", algorithm, training)
    if not task.test():
        raise ConfigError(f"task {task.name!r} has no test problems")
    resolve_device(profile.device)
    check_model(profile.model, allow_download=profile.allow_download)
    return task


def make_task(profile: Profile) -> Task:
    """The task of a profile.

    Raises:
        ConfigError: if there is none of that name or its settings are wrong.
    """
    located = profile.task.located()
    try:
        task = load_task(located.name, located.settings)
    except ValueError as error:
        raise ConfigError(f"task {profile.task.name}: {error}") from error
    if profile.chat is True and any(not problem.messages for problem in (*task.train()[:1], *task.test()[:1])):
        raise ConfigError(f"profile.chat = true, but task {profile.task.name} asks no conversations: set it to auto")
    return task


def resolve_device(name: str) -> str:
    """The device meant by `name`; `auto` takes an accelerator if there is one.

    Raises:
        ConfigError: if the device is not there.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return present.type if present else "cpu"
    if name != "cpu" and (present is None or present.type != name):
        raise ConfigError(f"device {name!r} is not there (found: {present.type if present else 'cpu'})")
    return name


def check_prompts(loaded: LoadedModel, problems: Sequence[Problem]) -> str:
    """Check that the model can be asked every problem; returns SHA-256 over them as they are asked, and their answers.

    Raises:
        ModelError: if the tokenizer would lose a part of a problem, or the chat template refuses one (`check_asked`).
    """
    asked = [text(loaded.tokenizer, problem) for problem in problems]
    check_asked(loaded, problems)
    lines = (f"{problem.id}\x1f{shown}\x1f{problem.answer}\n" for problem, shown in zip(problems, asked, strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def check_room(
    loaded: LoadedModel, problems: Sequence[Problem], training: Training, lengths: Sequence[int] = ()
) -> None:
    """Check that the model can be sampled, and has positions for every problem's prompt (and those of `lengths`).

    Raises:
        ConfigError: naming what does not fit.
    """
    asked = [len(ids) for ids in encode(loaded.tokenizer, problems)]
    check_sampling(loaded.model, loaded.tokenizer, [*asked, *lengths], training.max_new_tokens)


def within_length(
    problems: Sequence[Problem], loaded: LoadedModel, profile: Profile
) -> tuple[list[Problem], list[int]]:
    """Training problems whose prompt fits, and its tokens; with `long_prompts = "error"` one that does not raises."""
    limit = profile.training.max_prompt_tokens
    lengths = [len(ids) for ids in encode(loaded.tokenizer, problems)]
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    if len(kept) < len(lengths) and profile.training.long_prompts == "error":
        longest = max(lengths)
        raise ConfigError(
            f"profile.training.max_prompt_tokens is {limit}, but {len(lengths) - len(kept)} training prompts are "
            f"longer (up to {longest} tokens): raise it, or set long_prompts = 'filter'"
        )
    return [problems[i] for i in kept], [lengths[i] for i in kept]


def check_enough(count: int, said: str, algorithm: Algorithm, training: Training) -> None:
    """Raise where the problems do not fill one batch; `said` tells how many there are."""
    if count < training.prompts_per_step * algorithm.oversampling:
        factor = f" with algorithm.oversampling = {algorithm.oversampling}" if algorithm.oversampling > 1 else ""
        raise ConfigError(
            f"profile.training.prompts_per_step is {training.prompts_per_step}{factor}, but {said.format(count)}"
        )
