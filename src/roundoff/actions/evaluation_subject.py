"""What `roundoff eval` is pointed at: a run, a checkpoint, an adapter or a model directory, and what belongs to it.

What a run has made is scored as the run scores itself: on its task, lengths and hardware. A model from elsewhere
belongs to no task, so that one has to be named.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roundoff.actions.export import ORIGIN, read_origin
from roundoff.config import FORMAT_NAMES, ConfigError, Experiment, Hardware, Precision, Profile, Task, nearest, validate
from roundoff.experiments import experiment_ids, load_experiment, load_profile, profile_names, with_overrides
from roundoff.models.adapter_file import ADAPTER_CONFIG, read_adapter
from roundoff.runs.checkpoint import Checkpoint, check_origin, load_checkpoint, run_origin
from roundoff.runs.record import Run, read_run

PLAIN = "none"
"""Name of the hardware that changes nothing."""
SETTINGS = "experiment.toml"
"""File that makes a directory a run."""
SETTABLE = (
    "hardware",
    *(f"profile.{name}" for name in ("model", "chat", "dtype", "device", "threads", "allow_download", "task")),
    *(f"profile.training.{name}" for name in ("max_new_tokens", "noise_draws")),
)
"""Settings that a score depends on."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scored, and with what."""

    name: str
    experiment: Experiment
    profile: Profile
    seed: int
    run: Run | None = None
    """The run that it is a state of."""
    step: int = 0
    """Training steps that it has behind it."""
    checkpoint: Checkpoint | None = None
    """What the run had trained by then, over the model of the profile."""
    adapter: Path | None = None
    """An adapter directory, over the model of the profile."""
    notes: tuple[str, ...] = ()


def open_subject(
    target: str,
    *,
    step: int | None = None,
    profile: str | None = None,
    seed: int | None = None,
    hardware: str | None = None,
    task: str | None = None,
    assignments: Sequence[str] = (),
) -> Subject:
    """The subject that a path or model name means; what is not given is that of the run that made it.

    Raises:
        ConfigError: if the settings cannot be used, or no run made the model and no task is named.
        DamagedRunError: if the run cannot be read.
        DamagedCheckpointError: if it has no usable checkpoint.
    """
    _check_assignments(assignments)
    subject = _find(target, step, profile, _names_task(profile, task, assignments))
    experiment, scale = subject.experiment, subject.profile
    if hardware is not None:
        experiment = experiment.model_copy(update={"hardware": load_hardware(hardware)})
    if task is not None and task != scale.task.name:
        scale = scale.model_copy(update={"task": Task(name=task)})
    (changed,), scale = with_overrides([experiment], scale, assignments)
    experiment = experiment.model_copy(update={"hardware": changed.hardware})
    return replace(subject, experiment=experiment, profile=scale, seed=subject.seed if seed is None else seed)


def _check_assignments(assignments: Sequence[str]) -> None:
    """Refuse to replace what a score does not depend on: it would do nothing, without a word."""
    for text in assignments:
        path = text.partition("=")[0].strip()
        if not any(path == name or path.startswith(f"{name}.") for name in SETTABLE):
            raise ConfigError(f"--set {path} changes no score: roundoff eval takes {', '.join(SETTABLE)}")


def _names_task(profile: str | None, task: str | None, assignments: Sequence[str]) -> bool:
    """Whether the user said on what to score."""
    paths = {text.partition("=")[0].strip() for text in assignments}
    return profile is not None or task is not None or bool(paths & {"profile.task", "profile.task.name"})


def load_hardware(name: str) -> Hardware:
    """The hardware of an experiment (packaged or a TOML file), of a TOML file of its own, of a format, or `none`.

    The name of a format means that of weights and activations, as in `roundoff scan --format`.

    Raises:
        ConfigError: if there is none of that name, or a setting is wrong.
    """
    if name == PLAIN:
        return Hardware()
    if name in FORMAT_NAMES:
        return Hardware(precision=Precision(weight=name, activation=name))
    path = Path(name)
    if name.endswith(".toml") and path.is_file():
        try:
            content = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: is not TOML: {error}") from None
        if "extends" not in content and "algorithm" not in content:
            beside = [key for key in content if key in Hardware.model_fields]
            if "hardware" in content and beside:
                raise ConfigError(f"{name}: {', '.join(beside)} must be inside [hardware], not beside it")
            return validate(Hardware, content.get("hardware", content), source=name)
    if path.suffix != ".toml" and name not in experiment_ids():
        known = (PLAIN, *FORMAT_NAMES, *experiment_ids())
        formats = ", ".join(format_ for format_ in FORMAT_NAMES if ":" not in format_)
        raise ConfigError(
            f"--hardware must be {PLAIN!r}, a format for weights and activations ({formats}), the id of an experiment "
            f"(`roundoff list` shows all) or a TOML file, but is {name!r}{nearest(name, known)}"
        )
    return load_experiment(name).hardware


def _find(target: str, step: int | None, profile: str | None, names_task: bool) -> Subject:
    path = Path(target)
    whole = path.resolve()
    if whole.parent.name == "checkpoints" and (whole.parents[1] / SETTINGS).exists():
        if step is not None:
            raise ConfigError(f"{path} is the checkpoint of one step: leave out --step")
        number = re.fullmatch(r"step-(\d+)", whole.name)
        if number is None:
            raise ConfigError(f"{path} is no checkpoint, whose name reads step-<n>")
        path, step = (path.parents[1] if len(path.parts) > 2 else whole.parents[1]), int(number[1])
    if (path / SETTINGS).exists():
        return _state_of_run(read_run(path), step, profile)
    if step is not None:
        raise ConfigError(f"--step chooses a checkpoint of a run, but {target} is none")
    if (path / ADAPTER_CONFIG).exists():
        if (whole.parent / SETTINGS).exists():
            return _adapter_of_run(path, profile)
        _check_named(target, names_task)
        return _foreign_adapter(path, profile)
    if (path / ORIGIN).exists():
        return _exported(path, profile)
    if path.is_dir() or target.count("/") == 1:
        _check_named(target, names_task)
    scale = load_profile(profile or "tiny")
    return Subject(f"model {target}", _plain(path.name, target), scale.model_copy(update={"model": target}), 0)


def _check_named(target: str, names_task: bool) -> None:
    """Refuse to choose the task of a model that no run of roundoff made.

    Raises:
        ConfigError: with the command that names one.
    """
    if not names_task:
        raise ConfigError(
            f"{target} belongs to no run, so say what to score it on: `roundoff eval {shlex.quote(target)} --profile "
            f"NAME` takes task, lengths and draws of a profile ({', '.join(profile_names())}, or a TOML file); "
            "--task NAME alone takes the lengths of profile tiny"
        )


def _plain(name: str, source: str) -> Experiment:
    """An experiment for a model that none made: plain arithmetic."""
    return validate(Experiment, {"id": name, "algorithm": {"name": "GRPO"}}, source=source)


def _foreign_adapter(path: Path, profile: str | None) -> Subject:
    """An adapter from elsewhere, over the base model that it names."""
    base = read_adapter(path).config.base_model_name_or_path
    if not isinstance(base, str):
        raise ConfigError(f"{path / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path)")
    scale = load_profile(profile or "tiny").model_copy(update={"model": base})
    return Subject(f"adapter {path} over {base}", _plain(path.name, str(path)), scale, 0, adapter=path)


def _adapter_of_run(path: Path, profile: str | None) -> Subject:
    """What a run saved after its last step, over the model, on the task and hardware of that run."""
    run = read_run(path.resolve().parent)
    name = f"adapter of {run.experiment.id} seed {run.seed} over {run.profile.model} ({path})"
    experiment = run.experiment.model_copy(update={"lora": None})  # the adapter itself is put on, not fresh ones
    return Subject(name, experiment, _scale(run.profile, profile), run.seed, run, run.status.total_steps, adapter=path)


def _exported(path: Path, profile: str | None) -> Subject:
    """A model that `roundoff export` wrote, on the task and hardware of its run."""
    origin = read_origin(path)
    scale = _scale(origin.profile.model_copy(update={"model": str(path)}), profile)
    name = f"model {path}, exported from {origin.experiment.id} seed {origin.seed} after step {origin.step}"
    experiment = origin.experiment.model_copy(update={"lora": None})  # merged
    return Subject(name, experiment, scale, origin.seed, step=origin.step)


def _scale(own: Profile, profile: str | None) -> Profile:
    """A run's profile, or another one on the model, device and dtype of the run."""
    if profile is None:
        return own
    kept = {name: getattr(own, name) for name in ("model", "dtype", "device", "threads")}
    return load_profile(profile).model_copy(update=kept)


def _state_of_run(run: Run, step: int | None, profile: str | None) -> Subject:
    checkpoint = load_checkpoint(run.path / "checkpoints", step)
    check_origin(checkpoint, run_origin(run.experiment, run.profile, run.seed), run.experiment.id)
    scale = _scale(run.profile, profile)
    name = f"{run.experiment.id} seed {run.seed}, step {checkpoint.step} of {run.status.total_steps} ({run.path})"
    notes = tuple(f"passed over a damaged checkpoint: {line}" for line in checkpoint.skipped)
    return Subject(name, run.experiment, scale, run.seed, run, checkpoint.step, checkpoint, notes=notes)
