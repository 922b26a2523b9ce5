"""Copies of run directories between machines that share no disk: what has changed, packed, sent, and put in place.

A copy is always one that a run can go on from: a checkpoint arrives whole or not at all, and after the metrics of the
steps before it; what the run has removed (old checkpoints, steps taken again) is removed from the copy last.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from roundoff.checkpoint import write_directory

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
    """What of one run directory has been sent already."""

    path: Path
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    _units: set[str] = field(default_factory=set)

    def changes(self) -> Update:
        """What has changed since the last call."""
        units = {u: self.path / u for u in _units(self.path)}  # listed first: metrics read below are no older
        files: dict[str, bytes] = {}
        present = set(units)
        for file in sorted(_single_files(self.path), key=lambda f: (f.name == "status.json", f)):
            name = file.relative_to(self.path).as_posix()
            try:
                state = file.stat()
                mark = (state.st_mtime_ns, state.st_size)
                if self._sent.get(name) != mark:
                    files[name] = file.read_bytes()
                    self._sent[name] = mark
            except FileNotFoundError:  # the run has just removed it
                continue
            present.add(name)
        whole: dict[str, dict[str, bytes]] = {}
        for name, directory in units.items():
            if name not in self._units:
                try:
                    whole[name] = {f.name: f.read_bytes() for f in sorted(directory.iterdir())}
                except FileNotFoundError:
                    present.discard(name)
                    continue
                self._units.add(name)
        return Update(files, whole, frozenset(present))


def snapshot(path: Path) -> Update:
    """All that a run directory holds."""
    return Outbox(path).changes()


def put(update: Update, path: Path) -> None:
    """Bring the copy in `path` up to date; one that is cut short at any point can be gone on from."""
    for name, content in update.files.items():
        if name != "status.json":
            _write(path / name, content)
    for name, files in update.units.items():

        def fill(directory: Path, files: dict[str, bytes] = files) -> None:
            for file, content in files.items():
                (directory / file).write_bytes(content)

        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_directory(path / name, fill)
    if "status.json" in update.files:
        _write(path / "status.json", update.files["status.json"])
    for name in _units(path):
        if name not in update.present:
            shutil.rmtree(path / name)
    for file in _single_files(path):
        if file.relative_to(path).as_posix() not in update.present:
            file.unlink()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _units(path: Path) -> list[str]:
    """Relative paths of the directories that are written as one."""
    found = [f"checkpoints/{d.name}" for d in sorted((path / "checkpoints").glob("step-*")) if d.is_dir()]
    return found + (["adapter"] if (path / "adapter").is_dir() else [])


def _single_files(path: Path) -> list[Path]:
    """Every other file that is the run's: no lock, nothing half-written."""
    return [
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.relative_to(path).parts[0] not in UNITS
    ]
