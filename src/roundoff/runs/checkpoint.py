"""Checkpoints: how they are written, verified and read.

A checkpoint is a directory `step-<n>/` of safetensors files and a `state.json` that holds the SHA-256 of each file and
of itself. It is written under another name, flushed to disk, and renamed. A checkpoint that a kill or the disk has
damaged is passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundoff.config import ConfigError, Experiment, Profile, result_hash
from roundoff.errors import RoundoffError
from roundoff.runs.files import write_atomic, write_directory

if TYPE_CHECKING:
    import torch


class DamagedCheckpointError(RoundoffError, ValueError):
    """A checkpoint cannot be used; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """The tensors of each file, by its stem (`model`, `optimizer`)."""
    state: dict[str, Any]
    skipped: tuple[str, ...]
    """The reason for each later checkpoint that could not be used."""


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> None:
    """Save a checkpoint whole or not at all, then remove all but the last `keep`."""
    from safetensors.torch import save_file

    def fill(partial: Path) -> None:
        for name, group in tensors.items():
            save_file({k: v.contiguous() for k, v in group.items()}, partial / f"{name}.safetensors")
        sums = {f"{name}.safetensors": _checksum(partial / f"{name}.safetensors") for name in tensors}
        content = {"step": step, "checksums": sums, **state}
        write_atomic(partial / "state.json", json.dumps({**content, "sha256": _digest(content)}))

    for leaving in directory.glob(".step-*.partial"):  # left by a process that was killed
        shutil.rmtree(leaving)
    write_directory(checkpoint_path(directory, step), fill)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


def checkpoint_path(directory: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return directory / f"step-{step:06d}"


def remove_later(directory: Path, step: int) -> None:
    """Remove the checkpoints after `step`, which could not be used; their steps are taken again."""
    for path in _checkpoints(directory):
        if path > checkpoint_path(directory, step):
            shutil.rmtree(path)


def load_latest(directory: Path) -> Checkpoint | None:
    """The last undamaged checkpoint, or None where there is none at all.

    Raises:
        DamagedCheckpointError: if there are checkpoints and every one is damaged.
    """
    skipped: list[str] = []
    for path in reversed(_checkpoints(directory)):
        try:
            state, tensors = read_checkpoint(path)
        except DamagedCheckpointError as error:
            skipped.append(str(error))
            continue
        return Checkpoint(state["step"], tensors, state, tuple(skipped))
    if skipped:
        raise DamagedCheckpointError(
            "no usable checkpoint; move the run's directory away to start it again:\n" + "\n".join(skipped)
        )
    return None


def load_checkpoint(directory: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the last undamaged one.

    Raises:
        DamagedCheckpointError: if it is missing or damaged.
    """
    if step is not None:
        if not checkpoint_path(directory, step).exists():
            kept = ", ".join(str(int(path.name.removeprefix("step-"))) for path in _checkpoints(directory))
            raise DamagedCheckpointError(f"{directory} keeps no checkpoint of step {step} (kept: {kept or 'none'})")
        state, tensors = read_checkpoint(checkpoint_path(directory, step))
        return Checkpoint(state["step"], tensors, state, ())
    found = load_latest(directory)
    if found is None:
        raise DamagedCheckpointError(f"there is no checkpoint in {directory}")
    return found


def run_origin(experiment: Experiment, profile: Profile, seed: int) -> dict[str, Any]:
    """What a checkpoint records of the run that wrote it, without any name, for `check_origin` to compare."""
    one_epoch = experiment.model_copy(update={"epochs": 1})  # a longer run may continue the checkpoint of a shorter one
    return {"seed": seed, "settings": result_hash(one_epoch, profile), "epochs": experiment.epochs}


def check_origin(checkpoint: Checkpoint, expected: Mapping[str, Any], experiment: str) -> None:
    """Check that a checkpoint was written by the run with this origin, or by the run that it extends.

    Runs with equal settings and seed count as one run. A checkpoint of a version that recorded no origin is accepted.

    Args:
        checkpoint: what was read.
        expected: `run_origin` of the run.
        experiment: id of its experiment, which says what it extends.

    Raises:
        ConfigError: if another run wrote it.
    """
    origin = checkpoint.state.get("run")
    if origin is None:
        return
    extended = re.search(r"\+epochs=((?:\d+to)+)\d+$", experiment)  # see roundoff.actions.extend
    epochs = {str(expected["epochs"]), *(extended[1].split("to") if extended else [])}
    same = all(origin.get(name) == expected[name] for name in ("seed", "settings"))
    if not same or str(origin.get("epochs")) not in epochs:
        wrote, wanted = (", ".join(f"{name} {value}" for name, value in o.items()) for o in (origin, expected))
        raise ConfigError(
            f"the checkpoint of step {checkpoint.step} was written by another run ({wrote}) than this one ({wanted}): "
            "remove it from this run's checkpoints/, or bring back the experiment.toml that it was written under"
        )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """State and tensors of one checkpoint directory.

    Raises:
        DamagedCheckpointError: if a file is missing or differs from its checksum.
    """
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        if state.pop("sha256") != _digest(state):
            raise DamagedCheckpointError(f"{path / 'state.json'} differs from its checksum")
        for name, checksum in state["checksums"].items():
            if _checksum(path / name) != checksum:
                raise DamagedCheckpointError(f"{path / name} differs from its checksum")
        if path != checkpoint_path(path.parent, state["step"]):
            raise DamagedCheckpointError(f"{path} holds the state of step {state['step']}, not of the step it is named")
        return state, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["checksums"]}
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(directory: Path) -> Sequence[Path]:
    return sorted(directory.glob("step-*"))
