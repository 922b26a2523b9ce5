"""Large results ask for large pages."""

import sys
from pathlib import Path

import pytest
import torch

from roundoff.numerics.memory import OWN_PAGES, empty_like
from roundoff.numerics.noise import matmul_noise
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asks_for_large_pages(x):
    """Whether the mapping that holds the middle of a tensor has the flag `hg` (proc(5), /proc/pid/smaps)."""
    middle, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


needs_linux = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and ENABLED.exists() and Path("/proc/self/smaps").exists()),
    reason="this system has no large pages that a process may ask for",
)


@needs_linux
@pytest.mark.parametrize(
    "work",
    [empty_like, lambda x: quantize(x, "mxfp4"), lambda x: matmul_noise(x, 0.05, Key(1))],
    ids=["empty_like", "quantize", "matmul_noise"],
)
def test_a_large_result_asks_for_large_pages(work):
    x = torch.zeros(OWN_PAGES // 4)
    assert asks_for_large_pages(work(x))


@needs_linux
def test_a_small_result_does_not():
    x = torch.zeros(OWN_PAGES // 8)
    assert not asks_for_large_pages(empty_like(x))


def test_shape_and_dtype_are_kept():
    x = torch.zeros(3, OWN_PAGES // 2, dtype=torch.bfloat16)[1:]
    y = empty_like(x)
    assert y.shape == x.shape and y.dtype is x.dtype and y.is_contiguous()
