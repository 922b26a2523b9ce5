"""What `roundoff eval` scores: a run, a checkpoint, an adapter or a model directory, and the settings that go with it.

What a run made is scored as the run scores itself: on its task, lengths and hardware. A model from elsewhere belongs to
no task, so the user has to name one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roundoff.actions.export import ORIGIN, read_origin
from roundoff.actions.named_hardware import load_hardware
from roundoff.config import ConfigError, Experiment, Profile, Task, validate
from roundoff.experiments import load_profile, profile_names, with_overrides
from roundoff.models.adapter_file import ADAPTER_CONFIG, read_adapter
from roundoff.models.embedded import TINY, default_profile
from roundoff.runs.checkpoint import Checkpoint, check_origin, load_checkpoint, run_origin
from roundoff.runs.record import SETTINGS, Run, read_run

STATUS = "status.json"
"""File that every run has beside its settings; an experiment file of the user's own has no such neighbour."""
ADAPTER = "adapter"
"""Directory of a run's adapter, in the run's directory."""
MODEL_CONFIG = "config.json"
"""File that makes a directory a model."""
SETTABLE = (
    "hardware",
    *(f"profile.{name}" for name in ("model", "chat", "dtype", "device", "threads", "allow_download", "task")),
    *(f"profile.training.{name}" for name in ("max_new_tokens", "noise_draws")),
)
"""Settings that a score depends on."""


@dataclass(frozen=True, slots=True)
class EvaluationSubject:
    """A model to score, and the settings to score it with."""

    name: str
    """What the scores are printed under."""
    experiment: Experiment
    """Its hardware is the one that the deployed score is taken on."""
    profile: Profile
    """It gives model, task, lengths and noise draws."""
    seed: int
    """Seed of noise and samples."""
    run: Run | None = None
    """The run that trained the model; None for a model from elsewhere."""
    step: int = 0
    """Training steps that the model has taken."""
    checkpoint: Checkpoint | None = None
    """Weights of the run at that step, loaded over the profile's model."""
    adapter: Path | None = None
    """Directory of an adapter, put on the profile's model."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as a damaged checkpoint."""


def open_subject(
    target: str,
    *,
    step: int | None = None,
    profile: str | None = None,
    seed: int | None = None,
    hardware: str | None = None,
    task: str | None = None,
    assignments: Sequence[str] = (),
) -> EvaluationSubject:
    """The subject that a path or model name stands for; what is not given is taken from the run that made it.

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
    """Refuse to replace a setting that no score depends on, which would silently do nothing."""
    for text in assignments:
        path = text.partition("=")[0].strip()
        if not any(path == name or path.startswith(f"{name}.") for name in SETTABLE):
            raise ConfigError(f"--set {path} changes no score: roundoff eval takes {', '.join(SETTABLE)}")


def _names_task(profile: str | None, task: str | None, assignments: Sequence[str]) -> bool:
    """Whether the user named the task to score on."""
    paths = {text.partition("=")[0].strip() for text in assignments}
    return profile is not None or task is not None or bool(paths & {"profile.task", "profile.task.name"})


def _find(target: str, step: int | None, profile: str | None, names_task: bool) -> EvaluationSubject:
    path = Path(target)
    absolute = path.resolve()
    if absolute.parent.name == "checkpoints" and (absolute.parents[1] / SETTINGS).exists():
        if step is not None:
            raise ConfigError(f"{path} is the checkpoint of one step: leave out --step")
        number = re.fullmatch(r"step-(\d+)", absolute.name)
        if number is None:
            raise ConfigError(f"{path} is no checkpoint: the name of one reads step-<n>")
        path, step = _ancestor(path, 1), int(number[1])
    if (path / SETTINGS).exists():
        return _state_of_run(read_run(path), step, profile)
    is_adapter, is_exported = (path / ADAPTER_CONFIG).exists(), (path / ORIGIN).exists()
    if not (is_adapter or is_exported or (path / MODEL_CONFIG).exists()):
        _check_no_part_of_run(path)
        _check_no_runs_below(path)
    if step is not None:
        raise ConfigError(f"--step chooses a checkpoint of a run, but {target} is none")
    if is_adapter:
        if (absolute.parent / SETTINGS).exists():
            return _adapter_of_run(path, profile)
        _check_named(target, names_task)
        return _foreign_adapter(path, profile)
    if is_exported:
        return _exported(path, profile)
    if path.is_dir() or target.count("/") == 1:
        _check_named(target, names_task)
    scale = load_profile(profile or default_profile(target)).model_copy(update={"model": target})
    return EvaluationSubject(f"model {target}", _plain(path.name, target), scale, 0)


def _ancestor(path: Path, level: int) -> Path:
    """`path.parents[level]`, relative as the user wrote it where it can be."""
    return path.parents[level] if len(path.parts) > level + 1 else path.resolve().parents[level]


def _check_no_part_of_run(path: Path) -> None:
    """Refuse a path inside of a run that cannot be scored, such as its `checkpoints/`.

    Raises:
        ConfigError: with the command that scores the run.
    """
    above = path.resolve().parents
    level = next((n for n, p in enumerate(above) if (p / SETTINGS).exists() and (p / STATUS).exists()), None)
    named = path.exists() or path.name == ADAPTER or (level is not None and level < len(path.parts) - 1)
    if level is None or not named:  # inside of a run, `tiny` is still the name of a model
        return
    run = _ancestor(path, level)
    kept = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdecimal())
    reason = (
        f"{run} has no adapter: only a complete run with LoRA has one"
        if path.name == ADAPTER and not path.exists()
        else f"{path} lies in the run {run}, and is neither a checkpoint nor an adapter"
    )
    steps = f", and with --step N an earlier one (kept: {', '.join(map(str, kept))})" if len(kept) > 1 else ""
    raise ConfigError(f"{reason}. `roundoff eval {shlex.quote(str(run))}` scores the run's last checkpoint{steps}")


def _check_no_runs_below(path: Path) -> None:
    """Refuse a directory that holds runs or nothing to score, and a path beside runs where nothing is.

    Raises:
        ConfigError: with a command that scores one of the runs.
    """
    place = path if path.is_dir() else path.parent
    if not place.is_dir() or (not path.is_dir() and len(path.parts) < 2):  # the latter is the name of a model
        return
    runs = sorted(file.parent for depth in range(4) for file in place.glob(f"{'*/' * depth}seed-*/{SETTINGS}"))
    if runs:
        absent = "" if path.is_dir() else f"there is no {path}; "
        number = f"{len(runs)} runs: name one of them" if len(runs) > 1 else "one run: name it"
        raise ConfigError(
            f"{absent}{place} holds {number}, as in `roundoff eval {shlex.quote(str(runs[0]))}` "
            f"(`roundoff runs --runs {shlex.quote(str(place))}` lists what is there)"
        )
    if path.is_dir():
        raise ConfigError(
            f"{path} is neither a run (it holds no {SETTINGS}), nor an adapter (no {ADAPTER_CONFIG}), nor a model (no "
            f"{MODEL_CONFIG})"
        )


def _check_named(target: str, names_task: bool) -> None:
    """Refuse to choose a task for a model that no run of roundoff made.

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
    """An experiment on plain arithmetic, for a model that no experiment made."""
    return validate(Experiment, {"id": name, "algorithm": {"name": "GRPO"}}, source=source)


def _foreign_adapter(path: Path, profile: str | None) -> EvaluationSubject:
    """An adapter from elsewhere, over the base model that it names."""
    base = read_adapter(path).config.base_model_name_or_path
    if not isinstance(base, str):
        raise ConfigError(f"{path / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path)")
    scale = load_profile(profile or TINY).model_copy(update={"model": base})
    return EvaluationSubject(f"adapter {path} over {base}", _plain(path.name, str(path)), scale, 0, adapter=path)


def _adapter_of_run(path: Path, profile: str | None) -> EvaluationSubject:
    """The adapter that a run saved after its last step, on that run's model, task and hardware."""
    run = read_run(path.resolve().parent)
    name = f"adapter of {run.experiment.id} seed {run.seed} over {run.profile.model} ({path})"
    experiment = run.experiment.model_copy(update={"lora": None})  # the saved adapter goes on, not a fresh one
    return EvaluationSubject(
        name, experiment, _scale(run.profile, profile), run.seed, run, run.status.total_steps, adapter=path
    )


def _exported(path: Path, profile: str | None) -> EvaluationSubject:
    """A model that `roundoff export` wrote, on the task and hardware of its run."""
    origin = read_origin(path)
    scale = _scale(origin.profile.model_copy(update={"model": str(path)}), profile)
    name = f"model {path}, exported from {origin.experiment.id} seed {origin.seed} after step {origin.step}"
    experiment = origin.experiment.model_copy(update={"lora": None})  # merged
    return EvaluationSubject(name, experiment, scale, origin.seed, step=origin.step)


def _scale(own: Profile, profile: str | None) -> Profile:
    """A run's profile, or another one with the run's model, device, dtype and threads."""
    if profile is None:
        return own
    kept = {name: getattr(own, name) for name in ("model", "dtype", "device", "threads")}
    return load_profile(profile).model_copy(update=kept)


def _state_of_run(run: Run, step: int | None, profile: str | None) -> EvaluationSubject:
    checkpoint = load_checkpoint(run.path / "checkpoints", step)
    check_origin(checkpoint, run_origin(run.experiment, run.profile, run.seed), run.experiment.id)
    scale = _scale(run.profile, profile)
    name = f"{run.experiment.id} seed {run.seed}, step {checkpoint.step} of {run.status.total_steps} ({run.path})"
    notes = tuple(f"passed over a damaged checkpoint: {line}" for line in checkpoint.skipped)
    return EvaluationSubject(name, run.experiment, scale, run.seed, run, checkpoint.step, checkpoint, notes=notes)
