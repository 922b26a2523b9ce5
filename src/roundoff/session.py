"""What one run holds in memory: checked settings, model with its hardware, task, optimizer; saved and restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundoff.algorithms.schedule import sigma_curve
from roundoff.aqn import check_multipliers
from roundoff.batch import PromptStream
from roundoff.checkpoint import Checkpoint, DamagedCheckpointError
from roundoff.config import Algorithm, ConfigError, Experiment, Profile, Training
from roundoff.hardware.install import InstalledHardware, install
from roundoff.models.checkpointing import check_layers
from roundoff.models.load import LoadedModel, check_model, check_readable, load_model
from roundoff.models.lora import Adapters, attach
from roundoff.numerics.rng import Key
from roundoff.optimizer import MasterAdamW
from roundoff.parallel import ALONE, Ranks
from roundoff.prompts import encode, text
from roundoff.run_dir import RunDirectory
from roundoff.sampler import check_sampling
from roundoff.srdd import LayerScan, experiment_scan, layer_multipliers, needs_scan, resolve_keep
from roundoff.tasks import Problem, Task, load_task


@dataclass(frozen=True, slots=True)
class Policy:
    """A model as a run computes it: with its hardware, and its adapters over that."""

    loaded: LoadedModel
    installed: InstalledHardware | None
    adapters: Adapters | None
    base: str
    """SHA-256 of the weights that the model had when it was loaded."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.loaded.model

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the optimizer moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


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
    _check_enough(len(task.train()), "the task has only {} training problems", algorithm, training)
    if not task.test():
        raise ConfigError(f"task {task.name!r} has no test problems")
    resolve_device(profile.device)
    check_model(profile.model, allow_download=profile.allow_download)
    return task


def prepare(experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None) -> Session:
    """Check everything that can be checked, then load the model, scan it where needed, and install the hardware.

    `scan` is the one that the run already rests on, if any.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    task = check_settings(experiment, profile)
    given, algorithm = profile.training, experiment.algorithm
    training = training_in_force(algorithm, given)
    profile = profile.model_copy(update={"training": training})
    offered = task.train()
    key = Key.from_seed(seed)
    loaded = _load(profile)
    asked = check_prompts(loaded, (*offered, *task.test()))
    problems, lengths = _within_length(offered, loaded, profile)
    _check_enough(len(problems), "only {} training prompts are within max_prompt_tokens", algorithm, training)
    check_room(loaded, task.test(), training, lengths)
    if scan is None and experiment.needs_scan:
        scan = experiment_scan(experiment, loaded, task, seed)
    policy = _policy(experiment, loaded, seed, scan)
    if training.gradient_checkpointing:
        check_layers(policy.model)
    per_epoch = steps_per_epoch(len(problems), algorithm, given)
    total = experiment.epochs * per_epoch
    sigmas = sigma_curve(total, per_epoch, experiment.aqn) if experiment.aqn else [0.0] * total
    reference = None
    if algorithm.kl_coefficient > 0 and policy.adapters is None:
        reference = _load(profile).model
        _install(experiment, reference, seed, scan)
        reference.requires_grad_(False)
    optimizer = MasterAdamW(policy.trainable, learning_rate(experiment, profile), training)
    stream = PromptStream(problems, key.fold("data"))
    session = Session(experiment, profile, key, policy, reference, task, stream, optimizer, sigmas, scan, asked)
    if experiment.aqn is not None:
        for step in (1, total):
            check_multipliers(session.model, experiment.aqn, session.multipliers(step))
    return session


def load_policy(experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None) -> Policy:
    """The model of a run before its first step: on its hardware, with fresh adapters where it has any.

    `scan` is the one that the run rests on; where the hardware needs one and none is given, it is made.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    loaded = _load(profile)
    if scan is None and needs_scan(experiment.hardware):
        scan = experiment_scan(experiment, loaded, make_task(profile), seed)
    return _policy(experiment, loaded, seed, scan)


def _policy(experiment: Experiment, loaded: LoadedModel, seed: int, scan: LayerScan | None) -> Policy:
    """A plain model made into the policy: on its hardware, with fresh adapters where the experiment has any."""
    installed = _install(experiment, loaded.model, seed, scan)
    base = _digest(loaded.model)
    lora = experiment.lora
    adapters = attach(loaded.model, lora, Key.from_seed(seed)) if lora is not None else None
    return Policy(loaded, installed, adapters, base)


def _load(profile: Profile) -> LoadedModel:
    """The profile's model, plain."""
    return load_model(
        profile.model,
        dtype=getattr(torch, profile.dtype),
        device=resolve_device(profile.device),
        allow_download=profile.allow_download,
        chat=profile.chat,
    )


def _install(
    experiment: Experiment, model: PreTrainedModel, seed: int, scan: LayerScan | None
) -> InstalledHardware | None:
    """Put the experiment's hardware on a plain model, if that changes anything."""
    hardware = experiment.hardware if scan is None else resolve_keep(experiment.hardware, scan)
    return None if hardware.changes_nothing else install(model, hardware, seed=seed)


def learning_rate(experiment: Experiment, profile: Profile) -> float:
    """The learning rate after warm-up: `lora_learning_rate` for adapters."""
    training = profile.training
    return training.learning_rate if experiment.lora is None else training.lora_learning_rate


def make_task(profile: Profile) -> Task:
    """The task of a profile.

    Raises:
        ConfigError: if there is none of that name or its settings are wrong.
    """
    try:
        task = load_task(profile.task.name, profile.task.settings)
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
        ModelError: if the tokenizer would drop a character, or the chat template refuses a conversation.
    """
    asked = [text(loaded.tokenizer, problem) for problem in problems]
    check_readable(loaded, asked)
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


def _within_length(
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


def _check_enough(count: int, said: str, algorithm: Algorithm, training: Training) -> None:
    """Raise where the problems do not fill one batch; `said` tells how many there are."""
    if count < training.prompts_per_step * algorithm.oversampling:
        factor = f" with algorithm.oversampling = {algorithm.oversampling}" if algorithm.oversampling > 1 else ""
        raise ConfigError(
            f"profile.training.prompts_per_step is {training.prompts_per_step}{factor}, but {said.format(count)}"
        )


def save(session: Session, run_dir: RunDirectory, step: int) -> None:
    """Checkpoint everything that the next step depends on: weights, optimizer, place in the prompt stream."""
    trained = session.trainable
    tensors = {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": session.optimizer.tensors()}
    state = {"position": session.position, "base": session.policy.base, "problems": session.problems}
    run_dir.save_checkpoint(step, tensors, state, keep=session.profile.training.keep_checkpoints)


def restore(session: Session, checkpoint: Checkpoint) -> int:
    """Put a checkpoint's content in place, bit for bit; returns its step.

    Raises:
        ConfigError: if the profile's model or the task's problems have changed since the run began.
        DamagedCheckpointError: if the checkpoint holds the weights of another model.
    """
    _check_base(session.policy, checkpoint)
    if checkpoint.state.get("problems", session.problems) != session.problems:
        raise ConfigError(
            f"the problems of task {session.task.name!r}, or how they are asked, have changed since this run began: "
            "bring the old data back to go on, or move the run's directory away to begin again"
        )
    put_weights(session.policy, checkpoint)
    session.optimizer.put(checkpoint.tensors["optimizer"])
    session.position = checkpoint.state["position"]
    return checkpoint.step


def put_weights(policy: Policy, checkpoint: Checkpoint) -> None:
    """Put the weights that a checkpoint holds in place, bit for bit: all that a run trains.

    Raises:
        ConfigError: if they are adapters, and the base has changed since the run began.
        DamagedCheckpointError: if they are those of another model.
    """
    if policy.adapters is not None:
        _check_base(policy, checkpoint)
    weights = checkpoint.tensors["model"]
    trained = policy.trainable
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if found != expected:
        differing = sorted({name for name, _ in expected.items() ^ found.items()})
        raise DamagedCheckpointError(f"a checkpoint holds the weights of another model: {', '.join(differing[:4])}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _check_base(policy: Policy, checkpoint: Checkpoint) -> None:
    if checkpoint.state["base"] != policy.base:
        raise ConfigError(
            f"model {policy.loaded.name!r} has changed since this run began: bring the old one back to go on, or move "
            "the run's directory away to begin again"
        )


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 over names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
