"""Copies of run directories between machines that share no disk: what has changed, packed, sent, and put in place.

A copy is always one that a run can go on from: a checkpoint arrives whole or not at all, and after the metrics of the
steps before it; the status is no younger than anything else; what the run has removed (old checkpoints, steps taken
again) is removed from the copy last. The run goes on while it is read, so any file may vanish at any moment.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from roundoff.runs.files import write_directory

UNITS = ("checkpoints", "adapter")
"""Directories that hold, or are, units which a run writes whole or not at all."""


@dataclass(frozen=True, slots=True)
class Update:
    """What has changed in a run directory: contents by path relative to it, in the order to write them."""

    files: dict[str, bytes]
    """Single files; `status.json` is the last."""
    units: dict[str, dict[str, bytes]]
    """Directories written as one: path to its files."""
    present: frozenset[str]
    """All files and units that the run has."""

    def __bool__(self) -> bool:
        return bool(self.files or self.units)


@dataclass
class Outbox:
    """What of one run directory has been sent already; for one thread at a time."""

    path: Path
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Time of the last change (ns) and size of each file."""
    _units: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Inode and time of the last change (ns) of each unit: one that was written again is another."""

    def changes(self, *, quiet: bool = False) -> Update:
        """What has changed since the last call; `quiet`: no run is at work there, so what is incomplete stays so."""
        files: dict[str, bytes] = {}
        # The status first, so that it says nothing of files read before they were there; then the units, so that the
        # metrics read below are no older. Both are put in place in the opposite order.
        status = self._changed("status.json")
        units = {name: mark for name in _units(self.path) if (mark := _unit_mark(self.path / name)) is not None}
        present = set(units)
        for name in sorted(_single_files(self.path)):
            if name != "status.json" and (content := self._changed(name)) is not None:
                files[name] = content
            if name in self._sent:
                present.add(name)
        if status is not None:
            files["status.json"] = status
        whole: dict[str, dict[str, bytes]] = {}
        for name, mark in units.items():
            if self._units.get(name) != mark:
                found = _read_unit(self.path / name)
                if found is None or not (quiet or _is_whole(name, found)):
                    present.discard(name)
                    continue
                whole[name] = found
                self._units[name] = mark
        return Update(files, whole, frozenset(present))

    def _changed(self, name: str) -> bytes | None:
        """Content of a file that has changed since it was sent; None if it has not, or is not there."""
        file = self.path / name
        try:
            state = file.stat()
            mark = (state.st_mtime_ns, state.st_size)
            if self._sent.get(name) == mark:
                return None
            content = file.read_bytes()
        except FileNotFoundError:  # the run has just removed it, or not written it yet
            self._sent.pop(name, None)
            return None
        self._sent[name] = mark
        return content


def snapshot(path: Path) -> Update:
    """All that a run directory holds."""
    return Outbox(path).changes(quiet=True)


def put(update: Update, path: Path) -> None:
    """Bring the copy in `path` up to date; one that is cut short at any point can be gone on from."""
    for name, content in update.files.items():
        if name != "status.json":  # flushed before a checkpoint: the metrics up to it are never younger on disk
            _write(path / name, content, flush=bool(update.units))
    for name, files in update.units.items():

        def fill(directory: Path, files: dict[str, bytes] = files) -> None:
            for file, content in files.items():
                (directory / file).write_bytes(content)

        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_directory(path / name, fill)
    if "status.json" in update.files:
        _write(path / "status.json", update.files["status.json"], flush=bool(update.units))
    for name in _units(path):
        if name not in update.present:
            shutil.rmtree(path / name)
    for name in _single_files(path):
        if name not in update.present:
            (path / name).unlink()


def _write(path: Path, content: bytes, *, flush: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        if flush:
            os.fsync(file.fileno())
    partial.replace(path)


def _units(path: Path) -> list[str]:
    """Relative paths of the directories that are written as one."""
    found = [f"checkpoints/{d.name}" for d in sorted((path / "checkpoints").glob("step-*")) if d.is_dir()]
    return found + (["adapter"] if (path / "adapter").is_dir() else [])


def _unit_mark(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read_unit(path: Path) -> dict[str, bytes] | None:
    """Files of a unit; None where it has just vanished."""
    try:
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    except FileNotFoundError:
        return None


def _is_whole(name: str, files: dict[str, bytes]) -> bool:
    """Whether a checkpoint has every file that it lists: a run removes old ones file by file."""
    if not name.startswith("checkpoints/"):
        return True
    try:
        return set(json.loads(files["state.json"])["checksums"]) <= set(files)
    except (KeyError, ValueError, TypeError):
        return False


def _single_files(path: Path) -> list[str]:
    """Relative paths of every other file that is the run's: no lock, nothing half-written."""
    found = []
    for directory, inner, names in os.walk(path):  # which passes over a directory that vanishes meanwhile
        here = Path(directory).relative_to(path)
        inner[:] = [name for name in inner if not name.startswith(".") and (here / name).as_posix() not in UNITS]
        found += [(here / name).as_posix() for name in names if not name.startswith(".")]
    return found
