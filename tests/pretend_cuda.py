"""A device that is pretended, with `torch.cuda` as far as the benchmark of a GPU uses it; what the benchmark finds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.device.machine import Device
from benchmarks.device.results import Results, Row

from tests.pretend_device import pretended

CPU = Device("cpu")


class Rows(list[Row]):
    """Collects the rows of a part."""

    def results(self, part: str = "a", seconds: float = 60.0, *, is_judged: bool = True) -> Results:
        return Results(part, seconds, is_judged=is_judged, write=self.append)

    def verdicts(self) -> set[str]:
        return {row.verdict for row in self}

    def of(self, what: str) -> Row:
        (row,) = [row for row in self if row.what == what]
        return row


class PretendedCuda:
    """Clock, memory and synchronisations of no device; everything else is that of the real module."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.mode = "default"
        self.waits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    class Event:
        """A moment on the wall."""

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, later: PretendedCuda.Event) -> float:
            return 1e3 * (later.at - self.at)

    def synchronize(self) -> None:
        self.waits += 1

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self) -> None: ...

    def max_memory_allocated(self) -> int:
        return 3 << 30

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def item(self) -> None:
        """What an operation does that waits for the device."""
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)

    def get_device_name(self) -> str:
        return "Pretended 100"

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=80 << 30)


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device to measure on inside the block."""
    monkeypatch.setattr(torch, "cuda", PretendedCuda(torch.cuda))
    with pretended():
        yield Device("cuda")
