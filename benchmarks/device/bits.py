"""Part a: every format, the noise and the draws give the bits of the CPU.

Patterns are of two kinds in turn: random bits, with every exponent, subnormal numbers, infinities and NaN, in which
most blocks are NaN or have one large number; and random signs and mantissas with exponents within 2^16 of each other,
in which every code of a grid occurs. A NaN equals any NaN; all else is compared bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.numerics.test_golden import FILES, GOLDEN, tensor_scale

from benchmarks.device.machine import Device
from benchmarks.device.results import Results
from roundoff.numerics.formats import FORMATS, Format
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
RELATIVE_STD = 0.05


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
            shown = " and device ".join(f"{value:.9g}" for value in values)
            self.first = f"{what}, element {place}: {given.flatten()[place].item():.9g} -> CPU {shown}"


def chunks(total: int) -> Iterator[torch.Tensor]:
    """Float32 patterns [rows, 4096], `total` of them or a little more; the first chunk is small."""
    generator = torch.Generator().manual_seed(14)
    number = done = 0
    while done < total:
        rows = min(FIRST_ROWS if number == 0 else ROWS, -(-(total - done) // COLUMNS))
        drawn = torch.randint(-(2**31), 2**31, (rows, COLUMNS), generator=generator, dtype=torch.int64)
        bits = drawn.to(torch.int32)
        halves = bits.view(2, -1) if number == 0 and rows % 2 == 0 else None
        if halves is not None:
            halves[1] = near(halves[1])
        elif number % 2:
            bits = near(bits)
        yield bits.view(torch.float32)
        number, done = number + 1, done + rows * COLUMNS


def near(bits: torch.Tensor) -> torch.Tensor:
    """The same signs and mantissas (int32) with exponents from 2^-15 to 1."""
    return (bits & -0x78000001) + (112 << 23)


def taken(dtypes: tuple[torch.dtype, ...], work: Callable[[torch.Tensor], object]) -> list[torch.dtype]:
    """Those of some dtypes that an operation accepts."""
    found = []
    for dtype in dtypes:
        try:
            work(torch.ones(1, 32, dtype=dtype))
        except TypeError:
            continue
        found.append(dtype)
    return found


def golden(device: Device, results: Results) -> None:
    """Compare with the golden files; zeros of either sign are equal, as in the tests."""
    total = Comparison()
    cases = 0
    for file, name in sorted(FILES.items()):
        data = np.load(GOLDEN / f"{file}.npz")
        for case in (entry[:-3] for entry in data if entry.endswith("_in")):
            x, expected = (torch.from_numpy(data[f"{case}_{end}"]) for end in ("in", "out"))
            with device.as_device():
                found = quantize(x.to(device.name), name, tensor_scale=tensor_scale(data, case))
            total.add(f"{file} {case}", x, expected + 0.0, found + 0.0)
            cases += 1
    results.equal(
        "golden files", f"{len(FILES)} files, {cases} cases, {total.compared:,} elements", total.unequal, total.first
    )


def modes(fmt: Format) -> dict[str, dict[str, Any]]:
    """Arguments of `quantize` under which a format is compared."""
    found: dict[str, dict[str, Any]] = {"": {}, ", axis 0": {"axis": 0}}
    if fmt.tensor_divisor is not None:
        found |= {", a scale a row": {"tensor_scale": "row"}, ", scale 0.002": {"tensor_scale": 0.002}}
    if fmt.element is not None:
        found[", stochastic"] = {"stochastic": KEY}
    return found


def work_of_format(fmt: Format) -> dict[str, Work]:
    """Every mode and dtype of a format, the plainest first."""
    work: dict[str, Work] = {}
    for dtype in taken((torch.float32, torch.bfloat16, torch.float16), lambda x: quantize(x, fmt)):
        for mode, arguments in modes(fmt).items():
            work[f"{dtype}{mode}"] = lambda x, d=dtype, a=arguments: quantize(x.to(d), fmt, **a)
    return work


def work_of_noise() -> dict[str, Work]:
    """Noise on every dtype, with row ids of 64 bits and first columns of either sign."""

    def noise(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return matmul_noise(x.to(dtype), RELATIVE_STD, KEY, rows=row_ids(x), column_start=row_ids(x) >> 40)

    dtypes = taken((torch.float32, torch.bfloat16, torch.float16), lambda x: matmul_noise(x, RELATIVE_STD, KEY))
    return {str(dtype): lambda x, d=dtype: noise(x, d) for dtype in dtypes}


def row_ids(x: torch.Tensor) -> torch.Tensor:
    """An id of 64 bits for each row of x, on its device."""
    return (torch.arange(len(x), device=x.device) + 1) * 0x1E3779B97F4A7C15


DRAWS: dict[str, dict[str, Work]] = {
    "normal draws": {"float32": lambda x: normal(KEY, x.shape, rows=row_ids(x))},
    "uniform draws": {"float32": lambda x: uniform(KEY, x.shape, rows=row_ids(x))},
}


def compare(device: Device, work: dict[str, Work], given: Sequence[Pair], seconds: float) -> tuple[Comparison, int]:
    """Compare all of some work on the first chunk, and its first entry on the others for about so many seconds.

    Returns the comparison, and the number of patterns that the first entry met.
    """
    total, began, longest, met = Comparison(), time.monotonic(), 0.0, 0
    plainest = next(iter(work))
    for number, (here, there) in enumerate(given):
        start = time.monotonic()
        if number and start - began + longest > seconds:
            break
        for name, function in work.items() if number == 0 else [(plainest, work[plainest])]:
            expected = function(here)
            with device.as_device():
                found = function(there)
            total.add(name, here, expected, found)
        met += here.numel()
        longest = (time.monotonic() - start) if number else 0.0
    return total, met


def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of part a."""
    torch.set_grad_enabled(False)
    with results.attempt("golden files", device):
        golden(device, results)
    with results.attempt("patterns", device):
        given = [(x, x.to(device.name)) for x in chunks(SMALL_PATTERNS if small else PATTERNS)]
        everything = {"matmul noise 5 %": work_of_noise(), **DRAWS}
        everything |= {name: work_of_format(fmt) for name, fmt in FORMATS.items()}
        for number, (name, work) in enumerate(everything.items()):
            with results.attempt(name, device):
                seconds = results.seconds_left() / (len(everything) - number)
                total, met = compare(device, work, given, seconds)
                of = f"{met:,} {next(iter(work)).removeprefix('torch.')}"
                if len(work) > 1:
                    of += f", {total.compared - met:,} in {len(work) - 1} other modes"
                results.equal(name, of, total.unequal, total.first)
