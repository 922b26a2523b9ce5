"""Reads data files of problems, as JSON lines or parquet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roundoff.optional_packages import require
from roundoff.tasks.base import PATHS_BEGIN, TaskError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of the files that can be read."""


def read_rows(path: Path) -> list[Row]:
    """Every row of the file, in order.

    Raises:
        TaskError: if there is no such file, it is of another kind, or it cannot be read; an error in JSON names the
        line. ConfigError: if the file is parquet and pyarrow is not installed.
    """
    if not path.is_file():
        raise TaskError(f"there is no file {path} ({PATHS_BEGIN})")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in SUFFIXES:
        return _json_lines(path)
    raise TaskError(f"{path} must be {', '.join(SUFFIXES[:-1])} (one JSON object a line) or {SUFFIXES[-1]}")


def split_file(directory: Path, split: str) -> Path:
    """The only file of a directory whose name begins with that of the split, such as `train-00000-of-00001.parquet`.

    Raises:
        TaskError: if there is no such file or more than one; the message lists the files.
    """
    if not directory.is_dir():
        raise TaskError(f"there is no directory {directory} ({PATHS_BEGIN})")
    files = sorted(p for p in directory.iterdir() if p.suffix in SUFFIXES)
    matches = [p for p in files if p.name.startswith(split)]
    if len(matches) != 1:
        there = ", ".join(p.name for p in files) or "none"
        raise TaskError(f"{directory} must hold one file {split}*.jsonl or {split}*.parquet, but has: {there}")
    return matches[0]


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the columns that every row has, in the order of the first row."""
    return tuple(name for name in rows[0] if all(name in row for row in rows)) if rows else ()


def _json_lines(path: Path) -> list[Row]:
    rows = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines, because JSON text may hold U+2028
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{path}, line {number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: must be a JSON object, but is {line.strip()[:40]!r}")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    parquet = require("pyarrow.parquet", "data")
    arrow = require("pyarrow", "data")
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise TaskError(f"{path} cannot be read as parquet: {error}") from error
    return rows
