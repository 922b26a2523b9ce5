"""Run directories: the only reader and writer of what a run leaves behind.

    runs/<experiment>/<profile>-<hash8>/seed-<n>/
        experiment.toml         resolved settings of the experiment and the profile
        provenance.json         versions, device, commit, command
        metrics.jsonl           one line a step; all but `time` and `seconds*` is reproducible to the bit
        evaluations/step-*.jsonl   one line a problem
        checkpoints/step-*/     safetensors and state.json with the checksum of each file
        adapter/                LoRA adapters after the last step, as PEFT saves them
        tensorboard/            written by the tracker
        status.json             running | complete | failed | interrupted, last step, reason

Every file but the append-only `metrics.jsonl` is written whole or not at all (temporary file, fsync, rename). One
process holds the lock; a directory is never overwritten. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from filelock import FileLock, Timeout

from roundoff.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_latest,
    read_checkpoint,
    remove_later,
    save_checkpoint,
    write_atomic,
    write_directory,
)
from roundoff.config import ConfigError, Experiment, Profile, result_hash, validate

if TYPE_CHECKING:
    import torch

State = Literal["running", "complete", "failed", "interrupted"]
LOCK_WAIT_S = 1.0
"""Seconds to wait for a lock: a reader may hold it for an instant to see whether the run is alive."""


class RunLockedError(RuntimeError):
    """Another process is at work in this run directory."""


class DamagedRunError(ValueError):
    """A run directory, or a file in it, cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands."""

    state: State
    step: int
    """Last step whose results are on disk (0: before training)."""
    total_steps: int
    reason: str = ""
    seconds: float = 0.0
    """Time at work so far (s), all sessions together."""
    updated: str = ""
    """UTC time of the last change."""
    warnings: tuple[str, ...] = ()
    """What went wrong and was survived, such as a damaged checkpoint."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test problem."""

    id: str
    prompt: str
    answer: str
    deployed: tuple[int, ...]
    """1 where solved with the hardware on, one entry a noise draw."""
    clean: int
    """1 where solved with the hardware off."""
    response: str
    """Response with the hardware on, first draw."""
    clean_response: str
    truncated: bool = False
    """Whether that first response was cut at the length limit."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per-problem outcomes of the whole test set after `step` training steps."""

    step: int
    outcomes: tuple[Outcome, ...]

    @property
    def deployed(self) -> float:
        """Accuracy with the hardware on (fraction), mean over problems and draws."""
        return sum(sum(o.deployed) / len(o.deployed) for o in self.outcomes) / len(self.outcomes)

    @property
    def clean(self) -> float:
        """Accuracy with the hardware off (fraction)."""
        return sum(o.clean for o in self.outcomes) / len(self.outcomes)


def run_path(root: Path, experiment: Experiment, profile: Profile, seed: int) -> Path:
    """Directory of one run; the hash separates settings that give different results."""
    return root / experiment.id / f"{profile.name}-{result_hash(experiment, profile)}" / f"seed-{seed}"


class RunDirectory:
    """One run's directory, held by this process from `__enter__` to `__exit__`."""

    def __init__(self, root: Path, experiment: Experiment, profile: Profile, seed: int) -> None:
        self.path = run_path(root, experiment, profile, seed)
        self.experiment, self.profile, self.seed = experiment, profile, seed
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout:
            raise RunLockedError(
                f"{self.path} is held by another process: wait for it, or give --seeds another seed"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def tensorboard(self) -> Path:
        """Directory for TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def status(self) -> Status | None:
        """Last status written, or None for a run that never began."""
        return read_status(self.path) if (self.path / "status.json").exists() else None

    def start(self, provenance: Mapping[str, Any], total_steps: int, warnings: Sequence[str] = ()) -> Status:
        """Record settings and provenance of a new run, or take up an old one; the run is now `running`."""
        before = self.status
        if before is None:
            self._describe(provenance)
            before = Status("running", 0, total_steps)
        return self.set_status(replace(before, state="running", reason="", warnings=(*before.warnings, *warnings)))

    def _describe(self, provenance: Mapping[str, Any]) -> None:
        settings = {"seed": self.seed, "experiment": self.experiment, "profile": self.profile}
        write_atomic(self.path / "experiment.toml", _to_toml(settings))
        write_atomic(self.path / "provenance.json", json.dumps(provenance, indent=2) + "\n")

    def take_over(self, parent: Run, provenance: Mapping[str, Any], total_steps: int) -> None:
        """Begin where the complete run `parent` ended, with copies of what it left; the parent is only read.

        Raises:
            DamagedCheckpointError: if the parent's last checkpoint cannot be used.
        """
        last = parent.status.total_steps
        source = checkpoint_path(parent.path / "checkpoints", last)
        state, _ = read_checkpoint(source)
        origin = {"run": str(parent.path), "experiment": parent.experiment.id, "epochs": parent.experiment.epochs}
        origin |= {"step": last, "checksums": state["checksums"]}
        for step in parent.evaluated_steps:
            self.write_evaluation(parent.evaluation(step))
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in parent.metrics))
        write_directory(
            checkpoint_path(self.path / "checkpoints", last),
            lambda directory: shutil.copytree(source, directory, dirs_exist_ok=True),
        )
        self._describe({**provenance, "parent": origin})
        reason = f"extends {parent.path}, step {last} on"
        self.set_status(Status("interrupted", last, total_steps, reason, parent.status.seconds))

    def set_status(self, status: Status) -> Status:
        """Write `status`, stamped with the time."""
        status = replace(status, updated=datetime.now(UTC).isoformat(timespec="seconds"))
        write_atomic(self.path / "status.json", json.dumps(asdict(status), indent=2) + "\n")
        return status

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one step's line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics, evaluations and damaged checkpoints later than `step`: those steps are taken again."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for file in _evaluation_files(self.path):
            if _step_of(file) > step:
                file.unlink()
        remove_later(self.path / "checkpoints", step)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write the outcomes of one evaluation."""
        lines = (json.dumps(asdict(outcome)) + "\n" for outcome in evaluation.outcomes)
        write_atomic(self.path / "evaluations" / f"step-{evaluation.step:06d}.jsonl", "".join(lines))

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], *, keep: int
    ) -> None:
        """Save a checkpoint whole or not at all, then remove all but the last `keep`."""
        if (self.path / "metrics.jsonl").exists():
            with (self.path / "metrics.jsonl").open("a") as file:  # the rows up to a checkpoint are never younger
                os.fsync(file.fileno())
        save_checkpoint(self.path / "checkpoints", step, tensors, state, keep=keep)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last undamaged checkpoint, or None where there is none at all.

        Raises:
            DamagedCheckpointError: if there are checkpoints and every one is damaged.
        """
        return load_latest(self.path / "checkpoints")

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Save what `write` puts into the directory it is given as `adapter/`, whole or not at all."""
        write_directory(self.path / "adapter", write)

    def evaluation(self, step: int) -> Evaluation:
        """Outcomes after `step`.

        Raises:
            DamagedRunError: if the file is missing or malformed.
        """
        return read_evaluation(self.path, step)

    def save_diagnostics(self, name: str, content: Mapping[str, Any]) -> Path:
        """Keep what explains a failure in `diagnostics/<name>.json`."""
        path = self.path / "diagnostics" / f"{name}.json"
        write_atomic(path, json.dumps(content))
        return path


@dataclass(frozen=True)
class Run:
    """A run as the report sees it; evaluations are read when asked for."""

    path: Path
    experiment: Experiment
    profile: Profile
    seed: int
    status: Status
    provenance: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]

    @property
    def evaluated_steps(self) -> tuple[int, ...]:
        """Steps after which the test set was scored, ascending."""
        return tuple(_step_of(file) for file in _evaluation_files(self.path))

    def evaluation(self, step: int) -> Evaluation:
        """Outcomes after `step`.

        Raises:
            DamagedRunError: if the file is missing or malformed.
        """
        return read_evaluation(self.path, step)

    @property
    def is_final(self) -> bool:
        """Whether the last step was reached and evaluated."""
        return self.status.state == "complete" and self.status.total_steps in self.evaluated_steps


def read_run(path: Path) -> Run:
    """The run in `path`; a `running` status without a living holder is read as `interrupted`.

    Raises:
        DamagedRunError: if a file that every run has is missing or malformed.
    """
    try:
        settings = _parsed(path / "experiment.toml", tomllib.loads)
        provenance = _parsed(path / "provenance.json", json.loads)
        experiment = validate(Experiment, settings["experiment"], source=f"{path}/experiment.toml")
        profile = validate(Profile, settings["profile"], source=f"{path}/experiment.toml")
        status = read_status(path)
        metrics = tuple(read_metrics(path))
        seed = int(settings["seed"])
    except (KeyError, TypeError, ConfigError) as error:
        raise DamagedRunError(f"{path}/experiment.toml cannot be used: {error}") from error
    if status.state == "running" and not _is_held(path):
        status = replace(status, state="interrupted", reason="the process ended without a word")
    return Run(path, experiment, profile, seed, status, provenance, metrics)


def find_runs(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run below `roots`, and a line for each directory that looks like a run but cannot be read."""
    runs: list[Run] = []
    skipped: list[str] = []
    for root in roots:
        for path in sorted({*root.glob("**/seed-*"), *([root] if root.name.startswith("seed-") else [])}):
            try:
                runs.append(read_run(path))
            except DamagedRunError as error:
                skipped.append(str(error))
    return runs, skipped


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; a last line cut short by a kill is left out."""
    file = path / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DamagedRunError(f"{file}: line {number} is not JSON: {error}") from error
    return rows


def read_evaluation(run: Path, step: int) -> Evaluation:
    """Outcomes of the run in directory `run` after `step`.

    Raises:
        DamagedRunError: if the file is missing or malformed.
    """
    path = run / "evaluations" / f"step-{step:06d}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        outcomes = tuple(Outcome(**{**row, "deployed": tuple(row["deployed"])}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}") from error
    if not outcomes:
        raise DamagedRunError(f"{path} holds no outcome")
    return Evaluation(step, outcomes)


def read_status(path: Path) -> Status:
    """The status as written, whether or not the process that wrote it still lives.

    Raises:
        DamagedRunError: if there is none, or it is malformed.
    """
    try:
        content = _parsed(path / "status.json", json.loads)
        return Status(**{**content, "warnings": tuple(content.get("warnings", ()))})
    except (TypeError, AttributeError) as error:
        raise DamagedRunError(f"{path / 'status.json'} is not a status: {error}") from error


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}") from error


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _evaluation_files(path: Path) -> Sequence[Path]:
    return sorted((path / "evaluations").glob("step-*.jsonl"))


def _to_toml(settings: Mapping[str, Any]) -> str:
    plain = {
        k: v.model_dump(mode="json", exclude_none=True) if hasattr(v, "model_dump") else v for k, v in settings.items()
    }
    return tomli_w.dumps(plain)
