"""A run directory read back as values: settings, status, metrics, evaluations and scan. Nothing is written here.

`roundoff.runs.directory` writes these files and describes each of them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from roundoff.config import ConfigError, Experiment, Profile, validate
from roundoff.runs.health import Health, health_of
from roundoff.runs.outcomes import DamagedRunError, Evaluation, evaluation_file, read_evaluation

SETTINGS = "experiment.toml"
"""The file with the settings of a run, which makes a directory a run."""
State = Literal["running", "complete", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands."""

    state: State
    step: int
    """The last step whose results are on disk; 0 is the model before training."""
    total_steps: int
    reason: str = ""
    seconds: float = 0.0
    """Time spent on the run so far, over all sessions (s)."""
    updated: str = ""
    """Time of the last change (UTC)."""
    warnings: tuple[str, ...] = ()
    """Problems that the run survived, such as a damaged checkpoint."""
    trained_steps: int | None = None
    """Number of steps that trained anything; None before the end, and where the metrics do not say."""
    untrained: str = ""
    """Why a run that reached its end trained nothing; empty where it trained something."""


@dataclass(frozen=True)
class Run:
    """A run as the report sees it. Evaluations are read when they are asked for, everything else at once."""

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
        return tuple(step_of(file) for file in evaluation_files(self.path))

    def evaluation(self, step: int) -> Evaluation:
        """The outcomes of the evaluation after `step`.

        Raises:
            DamagedRunError: if the file is missing or malformed, does not hold every problem that was scored once, or
                holds other problems than the run's first evaluation.
        """
        row = next((row for row in self.metrics if row["step"] == step), {})
        found = read_evaluation(self.path, step, row.get("problems"))
        first = next(iter(self.evaluated_steps), step)
        if first != step and _problems(read_evaluation(self.path, first)) != _problems(found):
            raise DamagedRunError(f"{evaluation_file(self.path, step)} holds other problems than that of step {first}")
        return found

    @property
    def health(self) -> Health:
        """What became of the run's rollouts and steps."""
        return health_of(self.metrics, self.experiment.algorithm.group_size)

    @property
    def scan(self) -> dict[str, Any] | None:
        """The SRDD scan that the run rests on, as plain data; None where it has none.

        Raises:
            DamagedRunError: if the file is malformed.
        """
        return read_scan(self.path)

    @property
    def preflight(self) -> dict[str, Any] | None:
        """What AQN's largest sigma did to the model before training (`roundoff.aqn.preflight`); None without AQN.

        Raises:
            DamagedRunError: if the file is malformed.
        """
        return _measured(self.path / "preflight.json")

    @property
    def is_final(self) -> bool:
        """Whether the last step was reached and evaluated."""
        return self.status.state == "complete" and self.status.total_steps in self.evaluated_steps


def read_run(path: Path) -> Run:
    """The run in `path`; a `running` status without a living holder is read as `interrupted`.

    Raises:
        DamagedRunError: if a file that every run has is missing or malformed.
    """
    if not (path / SETTINGS).exists():
        raise DamagedRunError(f"{path} is no run (it holds no experiment.toml)")
    try:
        settings = _parsed(path / SETTINGS, tomllib.loads)
        provenance = _parsed(path / "provenance.json", _object)
        experiment = validate(Experiment, settings["experiment"], source=f"{path}/{SETTINGS}")
        profile = validate(Profile, settings["profile"], source=f"{path}/{SETTINGS}")
        status = read_status(path)
        metrics = tuple(read_metrics(path))
        seed = int(settings["seed"])
    except (KeyError, TypeError, ConfigError) as error:
        raise DamagedRunError(f"{path}/experiment.toml cannot be used: {error}") from error
    if status.state == "running" and not _is_held(path):
        status = replace(status, state="interrupted", reason="the process ended without a word")
    return Run(path, experiment, profile, seed, status, provenance, metrics)


def find_runs(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Find every run below `roots`.

    Returns:
        The runs, each of them once, and a line for each directory that looks like a run but cannot be read.
    """
    runs: list[Run] = []
    skipped: list[str] = []
    seen: set[Path] = set()
    for root in roots:
        for path in sorted({*root.glob("**/seed-*"), *([root] if root.name.startswith("seed-") else [])}):
            if not path.is_dir() or {file.name for file in path.iterdir()} <= {".lock"}:
                continue  # a file of that name, or a run that was refused before it began
            if path.resolve() in seen:  # one root may lie within another
                continue
            seen.add(path.resolve())
            try:
                runs.append(read_run(path))
            except DamagedRunError as error:
                skipped.append(str(error))
    return runs, skipped


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`. A last line that a kill cut short is left out.

    Raises:
        DamagedRunError: if a line is not a row of numbers with a step.
    """
    file = path / "metrics.jsonl"
    lines = _parsed(file, lambda text: text.splitlines(keepends=True)) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DamagedRunError(f"{file}: line {number} is not JSON: {error}") from error
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise DamagedRunError(f"{file}: line {number} is not the row of a step")
        for name, value in row.items():
            if name != "time" and not isinstance(value, int | float | list | None):
                raise DamagedRunError(f"{file}: line {number}: {name} must be a number, but is {value!r}")
        rows.append(row)
    return rows


def read_scan(path: Path) -> dict[str, Any] | None:
    """The SRDD scan that the run in `path` rests on, as plain data; None where it has none.

    Raises:
        DamagedRunError: if it is malformed.
    """
    return _measured(path / "scan.json")


def _measured(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where the run has no such file."""
    if not file.exists():
        return None
    content: dict[str, Any] = _parsed(file, _object)
    return content


def read_status(path: Path) -> Status:
    """The status as it was written, whether or not the process that wrote it is still alive.

    Raises:
        DamagedRunError: if the file is missing or malformed.
    """
    file = path / "status.json"
    content = _parsed(file, _object)
    try:
        status = Status(**{**content, "warnings": tuple(content.get("warnings", ()))})
    except TypeError as error:
        raise DamagedRunError(f"{file} is not a status: {error}") from error
    texts = status.reason, status.updated, status.untrained, *status.warnings
    whole = all(isinstance(value, int) for value in (status.step, status.total_steps, status.trained_steps or 0))
    if not whole or not isinstance(status.seconds, int | float) or not all(isinstance(text, str) for text in texts):
        raise DamagedRunError(f"{file} is not a status: a value in it is of another type")
    if status.state not in get_args(State):
        known = ", ".join(get_args(State))
        raise DamagedRunError(f"{file} is not a status: state must be one of {known}, but is {status.state!r}")
    return status


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


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
        return _is_held_by_another_user(path / ".lock")


def _is_held_by_another_user(lock: Path) -> bool:
    """Whether a lock that this user may only read is held; a shared lock on it fails while its holder has it."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # the system has no such locks, or the directory is a copy without one
        return False
    return False


def _problems(evaluation: Evaluation) -> set[tuple[str, str, str]]:
    """The problems of an evaluation, each with its prompt and answer."""
    return {(outcome.id, outcome.prompt, outcome.answer) for outcome in evaluation.outcomes}


def step_of(path: Path) -> int:
    """The step in the name of an evaluation file."""
    return int(path.stem.removeprefix("step-"))


def evaluation_files(path: Path) -> Sequence[Path]:
    """Evaluation files of the run in `path`, by step."""
    return sorted(file for file in (path / "evaluations").glob("step-*.jsonl") if file.stem[5:].isdecimal())
