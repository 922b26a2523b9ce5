"""Finds the task of a name: an entry of `TASKS`, or a class of the user's own as `module:Class` or `file.py:Class`.

Users name their own task in the profile instead of registering it from Python, because each run has a process of its
own (possibly on another machine), which must be able to find the task again.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from roundoff.config import nearest
from roundoff.tasks.base import PATHS_BEGIN, Task, TaskError
from roundoff.tasks.check import check_names

Factory = Callable[[Mapping[str, object]], Task]


def find_task(name: str, settings: Mapping[str, object], known: Mapping[str, Factory]) -> Task:
    """The task of this name, created with these settings.

    Args:
        name: a name in `known`, or a class of the user's own as `module:Class` or `file.py:Class`.
        settings: the task's own settings.
        known: factories of the packaged tasks by name.

    Raises:
        TaskError: if there is no such task, its settings are wrong, it lacks a member of `Task`, or its ids or prompts
            break a rule of `check_names`.
    """
    if ":" not in name:
        if name not in known:
            raise TaskError(
                f"task.name must be one of {', '.join(known)}, or a class of yours as module:Class or file.py:Class, "
                f"but is {name!r}{nearest(name, tuple(known))}"
            )
        return known[name](settings)
    task = _factory(name)(settings)
    missing = [m for m in ("name", "train", "test", "reward", "solution") if not hasattr(task, m)]
    if missing:
        raise TaskError(f"{name} is not a task: it has no {', '.join(missing)} (see roundoff.tasks.Task)")
    wrong = check_names(task.train(), task.test())
    if wrong:
        raise TaskError(f"{name}: {'; '.join(wrong)}")
    return task


def _factory(name: str) -> Factory:
    """The class or function at `module:name` or `file.py:name`."""
    where, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except ImportError as error:
        raise TaskError(f"task.name = {name!r}: {where} cannot be imported: {error}") from error
    target: Any = getattr(module, attribute, None)
    if not callable(target):
        raise TaskError(f"task.name = {name!r}: {where} has no class or function {attribute!r}")
    factory: Factory = target
    return factory


def _from_file(path: Path) -> ModuleType:
    """The module of a file, which is loaded once per process and whose name is its path."""
    if not path.is_file():
        raise TaskError(f"there is no file {path} ({PATHS_BEGIN})")
    name = str(path.resolve())
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # the suffix is .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module here
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
