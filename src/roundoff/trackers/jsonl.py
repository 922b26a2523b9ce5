"""A plain file with one JSON object per line, for programs that follow runs without reading run directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from roundoff.runs.files import write_atomic
from roundoff.runs.strict_json import dumps
from roundoff.trackers.base import Ended, TrackedRun

FILE = "scalars.jsonl"


class JsonlTracker:
    """Writes `scalars.jsonl` in the run's directory: the settings, then a line per step, then how the run ended."""

    def __init__(self, run: TrackedRun) -> None:
        path = run.path / FILE
        head = {"run": run.name, "group": run.group, "settings": run.settings}
        lines = [dumps(head)]
        if path.exists():  # steps after the checkpoint are logged again
            lines += [line for line in path.read_text("utf-8").splitlines()[1:] if _is_kept(line, run.resumed_from)]
        write_atomic(path, "\n".join(lines) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of step `step`."""
        self._write({"step": step, **values})

    def close(self, ended: Ended) -> None:
        """Append how the run ended, and close the file."""
        self._write({"ended": ended})
        self._file.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(dumps(content) + "\n")
        self._file.flush()


def _is_kept(line: str, resumed_from: int) -> bool:
    """Whether a line belongs to a step up to the checkpoint; a line that a kill cut short does not."""
    try:
        return bool(0 <= json.loads(line).get("step", -1) <= resumed_from)
    except ValueError:
        return False
