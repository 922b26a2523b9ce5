"""What a run left behind, as values: its settings, status, metrics, evaluations and scan; only read, never written.

`run_dir` writes these files and describes each.
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

State = Literal["running", "complete", "failed", "interrupted"]


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
        return tuple(step_of(file) for file in evaluation_files(self.path))

    def evaluation(self, step: int) -> Evaluation:
        """Outcomes after `step`.

        Raises:
            DamagedRunError: if the file is missing or malformed.
        """
        return read_evaluation(self.path, step)

    @property
    def scan(self) -> dict[str, Any] | None:
        """The SRDD scan that the run rests on, as plain data; None where it has none.

        Raises:
            DamagedRunError: if the file is malformed.
        """
        return read_scan(self.path)

    @property
    def preflight(self) -> dict[str, Any] | None:
        """What AQN's largest sigma did to the model before training (`roundoff.preflight`); None without AQN.

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
    try:
        settings = _parsed(path / "experiment.toml", tomllib.loads)
        provenance = _parsed(path / "provenance.json", _object)
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
    """Every run below `roots`, each once, and a line for each directory that looks like a run but cannot be read."""
    runs: list[Run] = []
    skipped: list[str] = []
    seen: set[Path] = set()
    for root in roots:
        for path in sorted({*root.glob("**/seed-*"), *([root] if root.name.startswith("seed-") else [])}):
            if not path.is_dir() or {file.name for file in path.iterdir()} <= {".lock"}:
                continue  # a file of such a name, or a run that was refused before it began
            if path.resolve() in seen:  # roots may lie within each other
                continue
            seen.add(path.resolve())
            try:
                runs.append(read_run(path))
            except DamagedRunError as error:
                skipped.append(str(error))
    return runs, skipped


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; a last line cut short by a kill is left out.

    Raises:
        DamagedRunError: if a line is no row of a step and its numbers.
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


def read_evaluation(run: Path, step: int) -> Evaluation:
    """Outcomes of the run in directory `run` after `step`.

    Raises:
        DamagedRunError: if the file is missing or malformed.
    """
    path = run / "evaluations" / f"step-{step:06d}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        outcomes = tuple(_checked(Outcome(**{**row, "deployed": tuple(row["deployed"])})) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}") from error
    if not outcomes:
        raise DamagedRunError(f"{path} holds no outcome")
    return Evaluation(step, outcomes)


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, if its texts are texts and it was solved or not in every draw."""
    texts = outcome.id, outcome.prompt, outcome.answer, outcome.response, outcome.clean_response
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of the problem {outcome.id!r} is of another type")
    if not outcome.deployed or any(solved not in (0, 1) for solved in (*outcome.deployed, outcome.clean)):
        raise ValueError(f"{outcome.id} must be solved (1) or not (0) in each draw, but is {outcome.deployed}")
    return outcome


def read_scan(path: Path) -> dict[str, Any] | None:
    """The SRDD scan that the run in `path` rests on, as plain data; None where it has none.

    Raises:
        DamagedRunError: if it is malformed.
    """
    return _measured(path / "scan.json")


def _measured(file: Path) -> dict[str, Any] | None:
    """The object in a file that not every run has."""
    if not file.exists():
        return None
    content: dict[str, Any] = _parsed(file, _object)
    return content


def read_status(path: Path) -> Status:
    """The status as written, whether or not the process that wrote it still lives.

    Raises:
        DamagedRunError: if there is none, or it is malformed.
    """
    file = path / "status.json"
    content = _parsed(file, _object)
    try:
        status = Status(**{**content, "warnings": tuple(content.get("warnings", ()))})
    except TypeError as error:
        raise DamagedRunError(f"{file} is not a status: {error}") from error
    texts = status.reason, status.updated, *status.warnings
    whole = isinstance(status.step, int) and isinstance(status.total_steps, int)
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
    """Whether a lock that may only be read is held: asked for a share of it, which its holder excludes."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # no such locks here, or no lock at all (a copy without it)
        return False
    return False


def step_of(path: Path) -> int:
    """The step in the name of an evaluation file."""
    return int(path.stem.removeprefix("step-"))


def evaluation_files(path: Path) -> Sequence[Path]:
    """Evaluation files of the run in `path`, by step."""
    return sorted(file for file in (path / "evaluations").glob("step-*.jsonl") if file.stem[5:].isdecimal())
