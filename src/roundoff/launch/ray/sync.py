"""Copies of run directories between machines that share no disk: what has changed is packed, sent, and put in place.

A run can be resumed from such a copy at any moment: a checkpoint arrives whole or not at all, and after the metrics of
the steps before it; the status is never newer than the other files; and what the run has removed (old checkpoints,
steps taken again) is removed from the copy last. The run goes on while its directory is read, so any file may vanish at
any moment.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from roundoff.runs.files import write_directory

UNITS = ("checkpoints", "adapter")
"""Directories that hold units, or are one; a unit is a directory that the run writes whole or not at all."""


@dataclass(frozen=True, slots=True)
class Update:
    """What has changed in a run directory, in the order in which to write it. Paths are relative to the directory."""

    files: dict[str, bytes]
    """Contents of single files by path; `status.json` is the last."""
    units: dict[str, dict[str, bytes]]
    """Units by path, each with the contents of its files by name."""
    present: frozenset[str]
    """Paths of all files and units that the run has."""

    def __bool__(self) -> bool:
        return bool(self.files or self.units)


@dataclass
class Outbox:
    """Tells what has changed in one run directory since it was last asked; for one thread at a time."""

    path: Path
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Modification time (ns) and size of each file sent."""
    _units: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Inode and modification time (ns) of each unit sent, which differ for a unit that was written again."""

    def changes(self, *, quiet: bool = False) -> Update:
        """What has changed since the last call.

        With `quiet` no run is at work in the directory: a unit that is incomplete stays so, and is sent as it is.
        """
        files: dict[str, bytes] = {}
        # The status is read first, so that it does not mention files that were missed; the units come next, so that the
        # metrics read after them are no older. `put` writes them in the opposite order.
        status = self._changed("status.json")
        units = {name: mark for name in _units(self.path) if (mark := _unit_mark(self.path / name)) is not None}
        present = set(units)
        for name in sorted(single_files(self.path)):
            if name != "status.json" and (content := self._changed(name)) is not None:
                files[name] = content
            if name in self._sent:
                present.add(name)
        if status is not None:
            files["status.json"] = status
        changed_units: dict[str, dict[str, bytes]] = {}
        for name, mark in units.items():
            if self._units.get(name) != mark:
                contents = _read_unit(self.path / name)
                if contents is None or not (quiet or _is_whole(name, contents)):
                    present.discard(name)
                    continue
                changed_units[name] = contents
                self._units[name] = mark
        return Update(files, changed_units, frozenset(present))

    def _changed(self, name: str) -> bytes | None:
        """Content of a file that has changed since it was sent; None if it has not changed or does not exist."""
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
    """Everything that a run directory holds."""
    return Outbox(path).changes(quiet=True)


def put(update: Update, path: Path) -> None:
    """Bring the copy in `path` up to date; wherever this is interrupted, the run can be resumed from the copy."""
    for name, content in update.files.items():
        if name != "status.json":  # flushed, so that a checkpoint never reaches the disk before the metrics up to it
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
    for name in single_files(path):
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
    """Relative paths of the units."""
    checkpoints = [f"checkpoints/{d.name}" for d in sorted((path / "checkpoints").glob("step-*")) if d.is_dir()]
    return checkpoints + (["adapter"] if (path / "adapter").is_dir() else [])


def _unit_mark(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read_unit(path: Path) -> dict[str, bytes] | None:
    """Contents of a unit's files by name; None if the unit has just vanished."""
    try:
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    except FileNotFoundError:
        return None


def _is_whole(name: str, files: dict[str, bytes]) -> bool:
    """Whether a unit is complete: a checkpoint has every file that it lists, unless the run is removing it."""
    if not name.startswith("checkpoints/"):
        return True
    try:
        return set(json.loads(files["state.json"])["checksums"]) <= set(files)
    except (KeyError, ValueError, TypeError):
        return False


def single_files(path: Path) -> list[str]:
    """Relative paths of the run's files outside of units, without its lock and half-written files."""
    paths = []
    for directory, inner, names in os.walk(path):  # it skips a directory that vanishes meanwhile
        here = Path(directory).relative_to(path)
        inner[:] = [name for name in inner if not name.startswith(".") and (here / name).as_posix() not in UNITS]
        paths += [(here / name).as_posix() for name in names if not name.startswith(".")]
    return paths
