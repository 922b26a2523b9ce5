"""Memory for large results on a CPU, in large pages.

A result of 64 MiB lies in memory that the system has not provided yet: the first write to each page of 4 KiB waits for
the system to find and clear it, which takes several times longer than the kernels. Linux provides pages of 2 MiB for
memory that asks for them (`madvise(2)`, MADV_HUGEPAGE); elsewhere, and where the system refuses, nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

OWN_PAGES = 32 << 20
"""Bytes from which the C library takes memory from the system for one request alone (mallopt(3),
M_MMAP_THRESHOLD); smaller requests share pages with others, and may get pages that are there already."""


def empty_like(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """An uninitialized tensor like the CPU tensor `x`; a large one asks for large pages."""
    y = torch.empty_like(x)
    if y.nbytes >= OWN_PAGES:
        advise = _madvise()
        if advise is not None:
            start = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (y.data_ptr() + y.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            advise(start, end - start, mmap.MADV_HUGEPAGE)  # advice, so an error is no reason to stop
    return y


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's `madvise`, where there is one that knows large pages."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise
