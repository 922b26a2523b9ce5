"""The choice between paths that give the same bits: compiled kernels on a CPU, Triton's on a GPU or NPU, plain torch.

The kernels are one C++ source without dependencies (`kernels/roundoff.cpp`). `roundoff.numerics.build` compiles it for
each kind of processor, and this module loads the library of the widest vectors that the processor has, through ctypes.
Where there is no library and no compiler, the torch path is used, and one line says so.

On the devices of `TRITON_DEVICES` the kernels are those of `roundoff.numerics.triton_kernels`. The first tensor of such
a device has them tried on two small examples with known bits. If Triton is missing, has no compiler for the device, or
gives other bits, the torch path is used there, too, and one line says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from roundoff.numerics.build import BuildError, library_for, targets_for

Backend = Literal["auto", "compiled", "torch"]

THREADED_ELEMENTS = 1 << 18
"""Elements per thread below which another thread does not pay off (`PER_THREAD` in kernels/roundoff.cpp)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Those of the tensors that numerics take; everything is computed in float32 and rounded once."""
TRITON_DEVICES = ("cuda", "xpu", "npu")
"""Types of devices for which Triton has compilers; `cuda` is AMD's, too, and triton-ascend provides that for `npu`."""

_LOG = logging.getLogger("roundoff")
_choice: ContextVar[str] = ContextVar("roundoff_backend", default="auto")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of the compiled library; kernels/roundoff.cpp gives their signatures."""

    quantize: Callable[..., None]
    noise: Callable[..., None]
    draw: Callable[..., None]
    norm: Callable[..., None]
    gate: Callable[..., None]
    attend: Callable[..., None]
    fingerprint: Callable[..., None]
    fingerprints: Callable[..., None]
    accumulate: Callable[..., None]
    path: Path
    """File of the library."""
    target: str
    """The vectors that it was compiled for, such as `avx2` (`roundoff.numerics.build`)."""


@contextlib.contextmanager
def use_backend(choice: Backend | str) -> Iterator[None]:
    """Fix the path that numerics take inside the block.

    Args:
        choice: "compiled" (C++ on the CPU, Triton on a device), "torch", "auto" (compiled if possible), or the target
            of the kernels for the CPU, such as "avx2", to measure or check a narrower one than the processor's widest.
            Inside a block of a target, "compiled" keeps that target.

    Raises:
        ValueError: if there is no such path, or this processor does not have the target's vectors.
        BuildError: if the kernels for the CPU are asked for and cannot be built. Under "compiled" it is also raised
            inside the block where a tensor is on a device that has no kernels.
    """
    here = targets_for(torch.backends.cpu.get_cpu_capability())
    if choice not in ("auto", "compiled", "torch", *here):
        known = ", ".join(f'"{target}"' for target in here)
        raise ValueError(f'the backend must be "auto", "compiled", "torch" or a target ({known}), but is {choice!r}')
    if choice == "compiled":
        if _choice.get() in here:
            choice = _choice.get()
        else:
            build()
    if choice in here:
        kernels_of(choice)
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def kernels_for(x: Shaped[Tensor, " ..."]) -> Kernels | None:
    """The compiled kernels for work on this tensor, or None if plain torch is to be used."""
    if torch.compiler.is_compiling() or not x.is_cpu:  # first: a graph cannot hold a context variable
        return None
    choice = _choice.get()
    if choice == "torch":
        return None
    return available_kernels() if choice in ("auto", "compiled") else kernels_of(choice)


def may_use_triton(x: Shaped[Tensor, " ..."]) -> bool:
    """Whether this tensor is on a device for which there may be Triton kernels; nothing is imported or tried."""
    return x.device.type in TRITON_DEVICES


def uses_triton(x: Shaped[Tensor, " ..."]) -> bool:
    """Whether Triton's kernels do the work on this tensor; the first call for a type of device tries them.

    Raises:
        BuildError: if "compiled" was chosen for a device on which they cannot be used.
    """
    if _choice.get() == "torch" or not may_use_triton(x):
        return False
    problem = triton_problem(x.device.type)
    if problem is not None and _choice.get() == "compiled":
        raise BuildError(problem)
    return problem is None


@functools.cache
def triton_problem(device: str) -> str | None:
    """Why Triton's kernels cannot be used on this type of device, or None; the reason is logged once, in one line."""
    try:
        from roundoff.numerics.triton_kernels.examples import first_difference

        problem = first_difference(device)
    except ModuleNotFoundError as error:
        problem = f"the package {error.name} is not installed"
    except Exception as error:  # Triton, its compilers and drivers raise anything
        problem = f"Triton failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem is not None:
        problem = f"no Triton kernels on {device}: {problem}"
        _LOG.warning("roundoff: %s; using the slower pure-torch path", problem)
    return problem


def can_write(out: Shaped[Tensor, "*shape"], x: Shaped[Tensor, "*shape"]) -> bool:
    """Whether a kernel may write to `out` while it reads the contiguous `x`.

    It may if `out` is contiguous and either has the memory of `x` or does not overlap it.
    """
    if not out.is_contiguous():
        return False
    shift = abs(out.data_ptr() - x.data_ptr())
    return shift == 0 or shift >= x.numel() * x.element_size()


def thread_count(elements: int) -> int:
    """Number of threads for this many elements: torch's setting, or one if the work is small.

    Results never depend on it.
    """
    return torch.get_num_threads() if elements >= 2 * THREADED_ELEMENTS else 1


@functools.cache
def available_kernels() -> Kernels | None:
    """The compiled kernels, or None if they cannot be built; the reason is logged once, in one line."""
    try:
        return build()
    except BuildError as error:
        _LOG.warning("roundoff: %s; using the slower pure-torch path", error)
        return None


@functools.cache
def build() -> Kernels:
    """Load the kernels for this processor; they are compiled first if they are not there yet.

    A target that the compiler does not know is passed over for the next narrower one.

    Raises:
        BuildError: if there is no compiler, it fails, or there is nowhere to write.
    """
    *wider, narrowest = targets_for(torch.backends.cpu.get_cpu_capability())
    for target in wider:
        with contextlib.suppress(BuildError):
            return kernels_of(target)
    return kernels_of(narrowest)


@functools.cache
def kernels_of(target: str) -> Kernels:
    """The kernels of one target; they are compiled first if they are not there yet.

    Raises:
        BuildError: if there is no compiler, it fails, or there is nowhere to write.
    """
    with library_for(target, lambda line: _LOG.warning("roundoff: %s", line)) as library:
        return load(library, target)


def computed_by(x: Shaped[Tensor, " ..."]) -> str:
    """What does the work on this tensor: the target of the compiled kernels, `triton`, or `torch`."""
    if uses_triton(x):
        return "triton"
    kernels = kernels_for(x)
    return "torch" if kernels is None else kernels.target


def load(library: Path, target: str) -> Kernels:
    """Load a library that was compiled for `target`.

    Raises:
        BuildError: if the system cannot load it.
    """
    try:
        handle = ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"loading {library} failed ({error})") from None
    pointer, long, single = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    integer, key = ctypes.c_int, ctypes.c_uint64
    quantize, noise, draw = handle.ro_quantize, handle.ro_noise, handle.ro_draw
    quantize.argtypes = [
        *(pointer, integer, pointer, pointer, long, long),
        *(integer, single, pointer, integer, key, integer),
    ]
    noise.argtypes = [integer, pointer, pointer, long, long, pointer, pointer, single, key, integer]
    draw.argtypes = [integer, pointer, long, long, pointer, pointer, key, integer]
    norm, gate, attend = handle.ro_norm, handle.ro_gate, handle.ro_attend
    norm.argtypes = [pointer, pointer, pointer, single, pointer, long, long, integer]
    gate.argtypes = [pointer, pointer, long, integer]
    attend.argtypes = [pointer, pointer, pointer, single, pointer, integer]
    fingerprint = handle.ro_fingerprint
    fingerprint.argtypes = [pointer, pointer, long, long, long, pointer]
    fingerprints = handle.ro_fingerprints
    fingerprints.argtypes = [pointer, long, long, long, pointer]
    accumulate = handle.ro_accumulate
    accumulate.argtypes = [pointer, pointer, pointer, long, long, long, integer, long, long, integer, integer]
    for function in (quantize, noise, draw, norm, gate, attend, fingerprint, fingerprints, accumulate):
        function.restype = None
    return Kernels(quantize, noise, draw, norm, gate, attend, fingerprint, fingerprints, accumulate, library, target)
