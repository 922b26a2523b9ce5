"""The time spent on a run, which may take several sessions."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the last lap, and over all sessions of a run."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._began = self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the beginning."""
        now = time.perf_counter()
        self._last, passed = now, now - self._last
        return passed

    def total(self) -> float:
        """Seconds of this session and of those before it."""
        return self._before + time.perf_counter() - self._began
