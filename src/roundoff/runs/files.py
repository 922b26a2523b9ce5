"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from roundoff.errors import RoundoffError


class DiskFullError(RoundoffError, OSError):
    """No space is left for a run's files; the message says where, and what to do."""


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
    _sync(path.parent)


def write_directory(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a directory whole or not at all: `fill` writes into an empty directory, which is then renamed to `path`.

    Raises:
        OSError: if the disk is full, also where the library that writes a file has an error of its own for it.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        for inside in partial.rglob("*"):
            _sync(inside)
        _sync(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
    except Exception as error:  # safetensors wraps the error of the system
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no space (or quota) is left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
