"""Run directories: this module alone writes what a run leaves behind, and `roundoff.runs.record` reads it.

    runs/<experiment>/<profile>-<hash8>/seed-<n>/
        experiment.toml         the resolved settings of the experiment and the profile
        provenance.json         versions, device, commit, command
        metrics.jsonl           one line for each step (`roundoff.runs.metrics`)
        scan.json               the SRDD scan, if a setting refers to one
        preflight.json          with AQN: what its largest sigma does before training
        evaluations/step-*.jsonl   one line for each problem
        checkpoints/step-*/     safetensors files, and state.json with their checksums
        adapter/                LoRA adapters after the last step, as PEFT saves them
        diagnostics/            what explains a failure, one JSON file each
        tensorboard/            written by the tracker
        status.json             state, last step, reason, number of trained steps

Every file but the append-only `metrics.jsonl` is written whole or not at all (temporary file, fsync, rename). One
process holds the lock; a directory is never overwritten. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from filelock import FileLock, Timeout

from roundoff.config import ConfigError, Experiment, Profile, result_hash
from roundoff.errors import RoundoffError
from roundoff.runs.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_latest,
    read_checkpoint,
    remove_later,
    save_checkpoint,
)
from roundoff.runs.files import write_atomic, write_directory
from roundoff.runs.health import Health, health_of
from roundoff.runs.metrics import check_row
from roundoff.runs.outcomes import (
    Evaluation,
    evaluation_file,
    evaluation_lines,
    read_evaluation,
)
from roundoff.runs.record import (
    SETTINGS,
    Run,
    Status,
    evaluation_files,
    read_metrics,
    read_scan,
    read_status,
    step_of,
)
from roundoff.runs.strict_json import dumps

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 240
"""Longest name of an experiment or a profile (bytes): file systems take 255, and the hash of a profile takes nine."""
LOCK_WAIT_S = 1.0
"""How long to wait for a lock (s): a reader may hold it for an instant to see whether the run is alive."""


class RunLockedError(RoundoffError, RuntimeError):
    """Another process is using this run directory."""


def run_path(root: Path, experiment: Experiment, profile: Profile, seed: int) -> Path:
    """The directory of one run; its hash separates settings that give different results.

    Raises:
        ConfigError: if the name of the experiment or the profile cannot name a directory.
    """
    for what, name in (("the id of an experiment", experiment.id), ("the name of a profile", profile.name)):
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"{what} must be 1 to {LONGEST_NAME} characters that can name a directory, without '/', but is {name!r}"
            )
    return root / experiment.id / f"{profile.name}-{result_hash(experiment, profile)}" / f"seed-{seed}"


def checkpoint_checksums(run: Run) -> dict[str, str]:
    """The checksum of each file in the last checkpoint of a complete run.

    Raises:
        DamagedCheckpointError: if the checkpoint cannot be used.
    """
    state, _ = read_checkpoint(checkpoint_path(run.path / "checkpoints", run.status.total_steps))
    return dict(state["checksums"])


class RunDirectory:
    """The directory of one run, which this process holds from `__enter__` to `__exit__`."""

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
    def status(self) -> Status | None:
        """The last status written, or None for a run that never began."""
        return read_status(self.path) if (self.path / "status.json").exists() else None

    def start(self, provenance: Mapping[str, Any], total_steps: int, warnings: Sequence[str] = ()) -> Status:
        """Record settings and provenance of a new run, or resume an old one; its state is `running` from now on."""
        before = self.status
        if before is None:
            self._describe(provenance)
            before = Status("running", 0, total_steps)
        return self.set_status(replace(before, state="running", reason="", warnings=(*before.warnings, *warnings)))

    def _describe(self, provenance: Mapping[str, Any]) -> None:
        settings = {"seed": self.seed, "experiment": self.experiment, "profile": self.profile}
        write_atomic(self.path / SETTINGS, _to_toml(settings))
        write_atomic(self.path / "provenance.json", json.dumps(provenance, indent=2) + "\n")

    def take_over(self, parent: Run, provenance: Mapping[str, Any], total_steps: int) -> None:
        """Begin where the complete run `parent` ended, with copies of its files; the parent itself is only read.

        Raises:
            DamagedCheckpointError: if the parent's last checkpoint cannot be used.
        """
        last = parent.status.total_steps
        source = checkpoint_path(parent.path / "checkpoints", last)
        checksums = checkpoint_checksums(parent)
        origin = {"run": str(parent.path), "experiment": parent.experiment.id, "epochs": parent.experiment.epochs}
        origin |= {"step": last, "checksums": checksums}
        for step in parent.evaluated_steps:
            self.write_evaluation(parent.evaluation(step))
        write_atomic(self.path / "metrics.jsonl", "".join(dumps(row) + "\n" for row in parent.metrics))
        if (scan := parent.scan) is not None:
            self.write_scan(scan)
        if (preflight := parent.preflight) is not None:
            self.write_preflight(preflight)
        write_directory(
            checkpoint_path(self.path / "checkpoints", last),
            lambda directory: shutil.copytree(source, directory, dirs_exist_ok=True),
        )
        self._describe({**provenance, "parent": origin})
        reason = f"extends {parent.path}, step {last} on"
        self.set_status(Status("interrupted", last, total_steps, reason, parent.status.seconds))

    def set_status(self, status: Status) -> Status:
        """Write `status` with the time; the status of a complete run also says whether anything was trained."""
        if status.state == "complete":
            health = self.health()
            notes = tuple(dict.fromkeys((*status.warnings, *health.failures())))
            trained = health.trained if health.steps else None
            status = replace(status, trained_steps=trained, untrained=health.untrained, warnings=notes)
        status = replace(status, updated=datetime.now(UTC).isoformat(timespec="seconds"))
        write_atomic(self.path / "status.json", json.dumps(asdict(status), indent=2) + "\n")
        return status

    def health(self) -> Health:
        """Counts of the rollouts and steps so far.

        Raises:
            DamagedRunError: if the metrics are malformed.
        """
        return health_of(read_metrics(self.path), self.experiment.algorithm.group_size)

    def write_scan(self, content: Mapping[str, Any]) -> None:
        """Write the SRDD scan that the run rests on; a resumed run reads it instead of scanning again."""
        write_atomic(self.path / "scan.json", json.dumps(content, indent=1) + "\n")

    def write_preflight(self, content: Mapping[str, Any]) -> None:
        """Write what was measured of AQN before the first step."""
        write_atomic(self.path / "preflight.json", dumps(content, indent=1) + "\n")

    def scan(self) -> dict[str, Any] | None:
        """The SRDD scan that this run rests on, as plain data, or None before it was written.

        Raises:
            DamagedRunError: if the file is malformed.
        """
        return read_scan(self.path)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one step's line to `metrics.jsonl`; a number that is not finite is null there.

        Raises:
            ValueError: if the row has a name that `roundoff.runs.metrics` does not define.
        """
        check_row(row)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Remove metrics, evaluations and damaged checkpoints after `step`, whose steps are taken again."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(dumps(row) + "\n" for row in rows))
        for file in evaluation_files(self.path):
            if step_of(file) > step:
                file.unlink()
        remove_later(self.path / "checkpoints", step)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write the outcomes of one evaluation."""
        write_atomic(evaluation_file(self.path, evaluation.step), evaluation_lines(evaluation))

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], *, keep: int
    ) -> None:
        """Save a checkpoint whole or not at all, then remove all but the last `keep`."""
        if (self.path / "metrics.jsonl").exists():  # its rows must be on the disk before the checkpoint is
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        save_checkpoint(self.path / "checkpoints", step, tensors, state, keep=keep)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last undamaged checkpoint, or None where there is none at all.

        Raises:
            DamagedCheckpointError: if there are checkpoints and every one is damaged.
        """
        return load_latest(self.path / "checkpoints")

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Save as `adapter/` the files that `write` puts into the directory it receives, whole or not at all."""
        write_directory(self.path / "adapter", write)

    def evaluation(self, step: int) -> Evaluation:
        """The outcomes of the evaluation after `step`.

        Raises:
            DamagedRunError: if the file is missing or malformed.
        """
        return read_evaluation(self.path, step)

    def save_diagnostics(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write what explains a failure to `diagnostics/<name>.json`; returns the path."""
        path = self.path / "diagnostics" / f"{name}.json"
        write_atomic(path, dumps(content))
        return path


def _to_toml(settings: Mapping[str, Any]) -> str:
    plain = {
        k: v.model_dump(mode="json", exclude_none=True) if hasattr(v, "model_dump") else v for k, v in settings.items()
    }
    return tomli_w.dumps(plain)
