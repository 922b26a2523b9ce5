"""What must hold before a run's first step: enough problems, prompts that the model can read, a device that is there.

All of it is checked before hardware is installed or anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from roundoff.aqn.noise import check_multipliers
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import (
    Algorithm,
    ConfigError,
    Experiment,
    Profile,
    Training,
    learning_rate,
    steps_per_epoch,
    training_in_force,
)
from roundoff.models.device import resolve_device
from roundoff.models.gradient_checkpointing import check_layers
from roundoff.models.load import LoadedModel, check_model
from roundoff.models.prompts import check_asked, encode, text
from roundoff.numerics.rng import Key
from roundoff.runs.checkpoint import run_origin
from roundoff.sampling.sampler import check_sampling
from roundoff.srdd import LayerScan, experiment_scan
from roundoff.tasks import Problem, Task, make_task
from roundoff.training.batch import PromptStream
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.policy import install_plain, load_plain, make_policy
from roundoff.training.session import Session


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
