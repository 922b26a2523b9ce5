"""The device under test: its clock, its memory, its synchronisations; on a CPU each has a plain stand-in.

The stand-ins let the whole script be rehearsed on a machine without an accelerator. What is behind `accelerator` in
this file is all that such a rehearsal leaves out.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundoff.models.device import resolve_device
from roundoff.numerics.backend import computed_by, use_backend
from roundoff.runs.provenance import machine, package_version

ROOT = Path(__file__).parents[2]
SYNCHRONISES = "synchronizing"
"""A word of the warning that torch gives for each host synchronisation in the mode `warn`."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its name in torch, such as `cuda`."""

    name: str

    @classmethod
    def named(cls, name: str) -> Device:
        """The device of this name.

        Raises:
            ConfigError: if this machine does not have it.
        """
        if name == "npu" and importlib.util.find_spec("torch_npu"):
            importlib.import_module("torch_npu")  # without it torch does not know the device
        return cls(resolve_device(name))

    @property
    def accelerator(self) -> Any:
        """torch's module of the device, such as `torch.cuda`; None on a CPU."""
        return None if self.name == "cpu" else getattr(torch, self.name)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was asked for."""
        if self.accelerator is not None:
            self.accelerator.synchronize()

    def is_alive(self) -> bool:
        """Whether the device still computes; an illegal access ends that for the rest of the process."""
        try:
            return float(torch.ones(2, device=self.name).sum()) == 2.0
        except RuntimeError:
            return False

    @contextmanager
    def as_device(self) -> Iterator[None]:
        """Compute on the device inside the block; a CPU then takes plain torch, to be compared with its kernels."""
        if self.accelerator is None:
            with use_backend("torch"):
                yield
        else:
            yield

    def computes_by(self) -> str:
        """What quantizes and draws on this device: `triton`, `torch`, or the vectors of the CPU's kernels."""
        return computed_by(torch.ones(1, device=self.name))

    def seconds(self, work: Callable[[], object], calls: int) -> list[float]:
        """Seconds of each of some calls on the device's own clock; nothing waits between them."""
        if self.accelerator is None:
            return [_on_the_wall(work) for _ in range(calls)]
        marks = []
        for _ in range(calls):
            first, last = (self.accelerator.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            marks.append((first, last))
        self.synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in marks]

    def wall_seconds(self, work: Callable[[], object]) -> float:
        """Seconds on the wall until the device has done all of the work."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def free_memory(self) -> None:
        """Give back what torch's allocator holds without need, and count the peak from here on."""
        if self.accelerator is not None:
            self.accelerator.empty_cache()
            self.accelerator.reset_peak_memory_stats()

    def peak_gibibytes(self) -> float | None:
        """The most memory that tensors held since `free_memory` (GiB); None on a CPU."""
        return None if self.accelerator is None else self.accelerator.max_memory_allocated() / 2**30

    @property
    def finds_synchronisations(self) -> bool:
        """Whether torch can tell on this device where the host waits for it."""
        return hasattr(self.accelerator, "set_sync_debug_mode")

    def synchronisations(self, work: Callable[[], object]) -> Counter[str]:
        """Host synchronisations during the work, by line of code, on a device where torch finds them."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.accelerator.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                self.accelerator.set_sync_debug_mode("default")
        return Counter(_place(w.filename, w.lineno) for w in caught if SYNCHRONISES in str(w.message))

    def copy_bandwidth(self, size: int) -> float:
        """Bytes per second, read and written, of a copy of `size` bytes on the device: the median of twenty."""
        source = torch.ones(size // 4, device=self.name)
        target = torch.empty_like(source)
        self.seconds(lambda: target.copy_(source), 3)
        return 2 * source.nbytes / statistics.median(self.seconds(lambda: target.copy_(source), 20))

    def describe(self) -> dict[str, str]:
        """Card, driver and versions, in words."""
        card = memory = "none"
        if self.accelerator is not None:
            card = str(self.accelerator.get_device_name())
            total = getattr(self.accelerator.get_device_properties(0), "total_memory", 0)
            memory = f"{total / 2**30:.1f} GiB"
        return {
            "device": self.name,
            "card": card,
            "memory": memory,
            "driver": _driver() if self.name == "cuda" else "unknown",
            "toolkit": str(torch.version.cuda or torch.version.hip or "none"),
            "torch": torch.__version__,
            "triton": package_version("triton") or "not installed",
            "transformers": package_version("transformers") or "not installed",
            "python": platform.python_version(),
            "processor": machine()["processor"],
            "computes by": self.computes_by(),
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread on the CPU inside the block, which is the fastest for tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _on_the_wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _place(file: str, line: int) -> str:
    """A line of code, relative to this project or to the packages."""
    name = re.sub(r".*/site-packages/", "", file)
    return f"{name.removeprefix(f'{ROOT}/')}:{line}"


def _driver() -> str:
    """Version of the NVIDIA driver, as `nvidia-smi` reports it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.splitlines()[0].strip()
