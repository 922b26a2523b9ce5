"""Part a: every format, the noise and the draws give the bits of the CPU.

Patterns are of two kinds in turn: random bits, with every exponent, subnormal numbers, infinities and NaN, in which
most blocks are NaN or have one large number; and random signs and mantissas with exponents within 2^16 of each other,
in which every code of a grid occurs. A NaN equals any NaN; all else is compared bit for bit.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.numerics.test_golden import FILES, GOLDEN, tensor_scale

from benchmarks.device.dtypes import DTYPES, accepts, shown
from benchmarks.device.machine import Device, one_thread
from benchmarks.device.results import FAILED, Results, write_row
from roundoff import FORMATS, Format
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key, normal, uniform

COLUMNS = 4096
PATTERNS, SMALL_PATTERNS = 100_000_000, 200_000
FIRST_ROWS, ROWS = 64, 4096
"""Rows of the first chunk of patterns, of which every format gets all, and of the others."""
KEY = Key.from_seed(14)
Pair = tuple[torch.Tensor, torch.Tensor]
"""The same patterns on the CPU and on the device."""
Work = Callable[[torch.Tensor], torch.Tensor]
INTEGERS = {4: torch.int32, 2: torch.int16}
PROCESSES = 8
"""That compile and compare the small work."""


@dataclass
class Comparison:
    """What was compared so far, how much of it differed, and the first example."""

    compared: int = 0
    unequal: int = 0
    first: str = ""

    def add(self, what: str, given: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Compare results of the CPU with those of the device, element by element."""
        there = expected.to(found.device)
        a, b = (x.contiguous().view(INTEGERS[x.element_size()]) for x in (there, found))
        differs = (a != b) & ~(there.isnan() & found.isnan())
        count = int(differs.sum())
        self.compared += expected.numel()
        self.unequal += count
        if count and not self.first:
            place = int(differs.flatten().to(torch.uint8).argmax())
            values = (x.flatten()[place].item() for x in (expected, found))
            both = " and device ".join(f"{value:.9g}" for value in values)
            self.first = f"{what}, element {place}: {given.flatten()[place].item():.9g} -> CPU {both}"


def chunks(total: int) -> Iterator[torch.Tensor]:
    """Float32 patterns [rows, 4096], `total` of them or a few more; the first chunk is small and holds both kinds.

    The number of rows is a multiple of 32, as kernels compile anew for numbers that are not.
    """
    generator = torch.Generator().manual_seed(14)
    number = done = 0
    while done < total:
        rows = FIRST_ROWS if number == 0 else min(ROWS, 32 * -(-(total - done) // (32 * COLUMNS)))
        drawn = torch.randint(-(2**31), 2**31, (rows, COLUMNS), generator=generator, dtype=torch.int64)
        bits = drawn.to(torch.int32)
        tame = bits[rows // 2 :] if number == 0 else bits[: rows * (number % 2)]
        tame.copy_(near(tame))
        yield bits.view(torch.float32)
        number, done = number + 1, done + rows * COLUMNS


def near(bits: torch.Tensor) -> torch.Tensor:
    """The same signs and mantissas (int32) with exponents from 2^-15 to 1."""
    return (bits & -0x78000001) + (112 << 23)


def golden(device: Device, results: Results, files: Sequence[str]) -> None:
    """Compare with golden files; zeros of either sign are equal, as in the tests."""
    for file in files:
        with results.attempt(f"golden file {file}", device):
            total, data = Comparison(), np.load(GOLDEN / f"{file}.npz")
            cases = [entry.removesuffix("_in") for entry in data if entry.endswith("_in")]
            for case in cases:
                x, expected = (torch.from_numpy(data[f"{case}_{end}"]) for end in ("in", "out"))
                with device.as_device():
                    found = quantize(x.to(device.name), FILES[file], tensor_scale=tensor_scale(data, case))
                total.add(case, x, expected + 0.0, found + 0.0)
            of = f"{len(cases)} cases, {total.compared:,} elements"
            results.equal(f"golden file {file}", of, total.unequal, total.first)


def work_of_format(fmt: Format) -> dict[str, Work]:
    """The ways in which a format is compared, the plainest first."""

    def way(dtype: torch.dtype, **arguments: Any) -> Work:
        return lambda x: quantize(x.to(dtype), fmt, **arguments)

    single = torch.float32
    work = {"float32": way(single), "float32, axis 0": way(single, axis=0)}
    if fmt.element is not None:
        work["float32, stochastic"] = way(single, stochastic=KEY)
    if fmt.tensor_divisor is not None:
        work["float32, scale 0.002"] = way(single, tensor_scale=0.002)
    for dtype in DTYPES:
        if dtype is not single and accepts(lambda x: quantize(x, fmt), dtype):
            work[shown(dtype)] = way(dtype)
        if fmt.tensor_divisor is not None and accepts(lambda x: quantize(x, fmt, tensor_scale="row"), dtype):
            work[f"{shown(dtype)}, a scale a row"] = way(dtype, tensor_scale="row")
    return work


def work_of_noise() -> dict[str, Work]:
    """Noise on every dtype, with row ids of 64 bits and first columns of either sign."""

    def noise(dtype: torch.dtype) -> Work:
        return lambda x: matmul_noise(x.to(dtype), 0.05, KEY, rows=row_ids(x), column_start=row_ids(x) >> 40)

    return {shown(dtype): noise(dtype) for dtype in DTYPES if accepts(lambda x: matmul_noise(x, 0.05, KEY), dtype)}


def row_ids(x: torch.Tensor) -> torch.Tensor:
    """An id of 64 bits for each row of x, on its device."""
    return (torch.arange(len(x), device=x.device) + 1) * 0x1E3779B97F4A7C15


def everything() -> dict[str, dict[str, Work]]:
    """All that is compared, by the name of its row."""
    return {
        "matmul noise 5 %": work_of_noise(),
        "normal draws": {"float32": lambda x: normal(KEY, x.shape, rows=row_ids(x))},
        "uniform draws": {"float32": lambda x: uniform(KEY, x.shape, rows=row_ids(x))},
        **{name: work_of_format(fmt) for name, fmt in FORMATS.items()},
    }


def compared(device: Device, total: Comparison, name: str, work: Work, given: Pair) -> None:
    """Do some work on both sides and compare."""
    here, there = given
    expected = work(here)
    with device.as_device():
        found = work(there)
    total.add(name, here, expected, found)


@one_thread()
def share_of_small(part: str, device_name: str, seconds: float, place: int, count: int) -> None:
    """Every `count`-th of the golden files and of all work, from `place` on, on the first chunk of patterns.

    This is the body of a process: most of the time goes into compiling kernels, one for each format, dtype and mode,
    and what one process has compiled the others find on disk.
    """
    device = Device(device_name)
    results = Results(part, seconds, is_judged=True, write=write_row)
    golden(device, results, sorted(FILES)[place::count])
    x = next(chunks(1))
    for name, work in list(everything().items())[place::count]:
        with results.attempt(f"{name}, in every mode", device):
            total, pair = Comparison(), (x, x.to(device.name))
            met = 0
            for mode, function in work.items():
                if met and results.seconds_left() < 0:
                    break
                compared(device, total, mode, function, pair)
                met += 1
            of = f"{total.compared:,} elements, {met} of {len(work)} modes"
            results.equal(f"{name}, in every mode", of, total.unequal, total.first)


def in_processes(part: str, device: Device, seconds: float, count: int) -> int:
    """Do all shares of the small work, each in a process; returns how many did not come to their end."""
    context = multiprocessing.get_context("spawn")
    shares = [(part, device.name, seconds, place, count) for place in range(count)]
    processes = [context.Process(target=share_of_small, args=share, daemon=True) for share in shares]
    for process in processes:
        process.start()
    until = time.monotonic() + 2 * seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return sum(process.exitcode != 0 for process in processes)


def many(device: Device, results: Results, total: int) -> None:
    """The plainest mode of all work on this many patterns; on fewer where they would take more than a share of time."""
    given = [(x, x.to(device.name)) for x in chunks(total)]
    work = everything()
    for number, (name, ways) in enumerate(work.items()):
        what = f"{name}, many"
        share = results.seconds_left() / (len(work) - number)
        if share < 0:
            results.left_out(what, "the time of this part was over")
            continue
        with results.attempt(what, device):
            found, began, longest = Comparison(), time.monotonic(), 0.0
            mode, function = next(iter(ways.items()))
            for place, pair in enumerate(given):
                start = time.monotonic()
                if start - began + longest > share:
                    break
                compared(device, found, mode, function, pair)
                longest = (time.monotonic() - start) if place else 0.0
            results.equal(what, f"{found.compared:,} patterns", found.unequal, found.first)


def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of part a."""
    count = 2 if small else PROCESSES
    if failed := in_processes(results.part, device, 0.5 * results.seconds_left(), count):
        results.row("golden files and modes", f"{failed} of {count} processes did not come to their end", "", FAILED)
    many(device, results, SMALL_PATTERNS if small else PATTERNS)
