"""Resolves relative paths of a profile's task, from the TOML file that gives them or, for `--set`, from the shell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundoff.config import with_paths


def placed(over: Mapping[str, Any], directory: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """The content `over`, adapted so that it can be merged over the content `base` of a profile.

    The task of the merged profile has one directory, from which its relative paths begin. If `base` has one and both
    name the same task, that directory stays, and the paths in `over` are rewritten relative to it.

    Args:
        over: content of a profile that gives paths relative to `directory`.
        directory: the directory of the TOML file, or the one that roundoff was started in.
        base: content of the profile that `over` extends or changes.
    """
    task, before = over.get("task"), base.get("task")
    if not isinstance(task, Mapping):
        return dict(over)
    before = before if isinstance(before, Mapping) else {}
    name, settings = task.get("name", before.get("name")), task.get("settings", {})
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        return dict(over)  # the check of the settings reports what is wrong with them
    here = str(directory / task["directory"]) if isinstance(task.get("directory"), str) else str(directory)
    there = before.get("directory") if name == before.get("name") and "directory" not in task else None
    if "directory" not in task and not _relative(name if "name" in task else "", name, settings):
        return dict(over)
    if there is None or there == here:
        return {**over, "task": {**task, "directory": here}}

    def from_there(path: Path) -> str:
        return os.path.relpath(Path(here) / path, there)

    moved_name, moved = with_paths(name, settings, from_there)
    changed = {**task, "directory": there}
    changed |= {"name": moved_name} if "name" in task else {}
    changed |= {"settings": moved} if "settings" in task else {}
    return {**over, "task": changed}


def _relative(given_name: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether `given_name`, or `settings` of the task `name`, hold a relative path."""
    paths: list[Path] = []

    def note(path: Path) -> str:
        paths.append(path)
        return str(path)

    with_paths(given_name, {}, note)
    if ":" not in name:
        with_paths(name, settings, note)
    return bool(paths)
