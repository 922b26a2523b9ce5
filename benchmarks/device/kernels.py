"""Part c, kernels: quantize-dequantize, noise and draws against a copy on the device.

A kernel that reads each number once and writes it once can be as fast as a copy of the same bytes. The figure is the
share of the copy's bandwidth that it reaches: bytes read and written over its time, over that of the copy, which runs
in turn with it. A scale for the whole tensor needs a second pass over the input, and draws are written only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.device.dtypes import accepts, shown
from benchmarks.device.machine import Device
from benchmarks.device.results import Results
from roundoff import FORMATS
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal

BYTES, SMALL_BYTES = 1 << 29, 1 << 20
"""Of one tensor: far more than a cache holds, so that everything comes from memory."""
COLUMNS = 4096
FORMAT_GOAL, NOISE_GOAL = 0.85, 0.70
FIRST = ("mxfp4", "nvfp4", "mxfp8_e4m3")
"""Formats that are timed before all others, should the time not suffice."""
KEY = Key.from_seed(15)
SECONDS_EACH = 0.25
"""Of timed calls of one kernel, about."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one tensor."""

    name: str
    call: Callable[[], object]
    traffic: float
    """Bytes that it must move, over those of the tensor: 2 for one pass that reads and writes."""
    goal: float | None
    """Share of the copy's bandwidth to reach; None without a goal."""


def of_format(name: str, x: torch.Tensor, out: torch.Tensor) -> list[Kernel]:
    """Ways in which a format is used."""
    fmt = FORMATS[name]
    goal = None if fmt.element is None else FORMAT_GOAL  # torch's own casts have none
    if fmt.tensor_divisor is None:
        return [Kernel(name, lambda: quantize(x, name, out=out), 2, goal)]
    computed = Kernel(f"{name}, scale computed", lambda: quantize(x, name, out=out), 3, goal)
    if not accepts(lambda x: quantize(x, name, tensor_scale="row")):
        return [computed]
    by_row = Kernel(f"{name}, a scale a row", lambda: quantize(x, name, tensor_scale="row", out=out), 2, goal)
    return [by_row, computed]


def of_dtype(dtype: torch.dtype, x: torch.Tensor, out: torch.Tensor) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels that matter most, and the others."""
    rows = torch.arange(len(x), device=x.device)
    first = [kernel for name in FIRST for kernel in of_format(name, x, out)]
    first += [
        Kernel("matmul noise 5 %", lambda: matmul_noise(x, 0.05, KEY, rows=rows, out=out), 2, NOISE_GOAL),
        Kernel("mxfp4, stochastic", lambda: quantize(x, "mxfp4", out=out, stochastic=KEY), 2, None),
    ]
    others = [kernel for name in FORMATS if name not in FIRST for kernel in of_format(name, x, out)]
    if dtype is torch.float32:
        others.append(Kernel("normal draws", lambda: normal(KEY, x.shape, rows=rows), 1, None))
    return first, others


def time_kernel(device: Device, results: Results, kernel: Kernel, x: torch.Tensor, out: torch.Tensor) -> None:
    """Time one kernel in turn with the copy, and write its row."""
    began = time.monotonic()
    kernel.call()  # compiles
    device.synchronize()
    compiled = time.monotonic() - began
    once = device.wall_seconds(kernel.call)
    turns = int(min(25, max(1, SECONDS_EACH / once)))
    taken: list[float] = []
    copied: list[float] = []
    for _ in range(turns):
        copied += device.seconds(lambda: out.copy_(x), 2)[1:]
        taken += device.seconds(kernel.call, 2)[1:] if turns > 1 else [once]
    seconds, copy = statistics.median(taken), statistics.median(copied)
    share = kernel.traffic * copy / (2 * seconds)
    what = f"{kernel.name}, {shown(x.dtype)}"
    measured = f"{share:.2f} of a copy ({1e3 * seconds:.3f} ms; copy {1e3 * copy:.3f} ms)"
    details = {"seconds": seconds, "copy_seconds": copy, "first_call_seconds": compiled}
    if kernel.goal is None:
        results.shown(what, measured, **details)
    else:
        results.at_least(what, share, kernel.goal, measured, **details)


def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of this part."""
    size = SMALL_BYTES if small else BYTES
    bandwidth = device.copy_bandwidth(size)
    results.shown("copy", f"{bandwidth / 1e9:,.0f} GB/s, read and written", bytes_per_second=bandwidth)
    results.shown("quantizes and draws by", device.computes_by())
    work: list[list[tuple[Kernel, torch.Tensor, torch.Tensor]]] = [[], []]
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(size // 4, device=device.name).to(dtype)
        x = (x if dtype is torch.float32 else x.repeat(2)).view(-1, COLUMNS)
        out = torch.empty_like(x)
        for place, kernels in zip(work, of_dtype(dtype, x, out), strict=True):
            place += [(kernel, x, out) for kernel in kernels]
    for kernel, x, out in work[0] + work[1]:
        what = f"{kernel.name}, {shown(x.dtype)}"
        if results.seconds_left() < 0:
            results.left_out(what, "the time of this part was over")
            continue
        with results.attempt(what, device):
            time_kernel(device, results, kernel, x, out)
