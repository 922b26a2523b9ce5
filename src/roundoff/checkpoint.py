"""Files written whole or not at all, and checkpoints made of them.

A checkpoint is a directory `step-<n>/` of safetensors files and a `state.json` that holds the SHA-256 of each and
of itself. It is written beside its place, flushed to disk, and renamed; one that a kill or the disk has damaged is
passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back whole."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """File stem (`model`, `optimizer`) to its tensors."""
    state: dict[str, Any]
    skipped: tuple[str, ...]
    """Later checkpoints that could not be used, each with the reason."""


def write_atomic(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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

    final = directory / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            save_file({k: v.contiguous() for k, v in group.items()}, partial / f"{name}.safetensors")
        sums = {f"{name}.safetensors": _checksum(partial / f"{name}.safetensors") for name in tensors}
        content = {"step": step, "checksums": sums, **state}
        write_atomic(partial / "state.json", json.dumps({**content, "sha256": _digest(content)}))
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync_directory(final.parent)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


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
        raise DamagedCheckpointError("no usable checkpoint:\n" + "\n".join(skipped))
    return None


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
        return state, {name.removesuffix(".safetensors"): load_file(path / name) for name in state["checksums"]}
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    """SHA-256 of a file that is then safely on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _checkpoints(directory: Path) -> Sequence[Path]:
    return sorted(directory.glob("step-*"))
