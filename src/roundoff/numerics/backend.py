"""The choice between two paths that give the same bits: compiled kernels on a CPU, or plain torch.

The kernels are one C++ source without dependencies (`kernels/roundoff.cpp`), compiled at first use into the user's
cache directory and loaded through ctypes. The name of the library is a hash of source, compiler, flags and CPU, so a
changed source, another compiler, or another machine that shares the directory never loads a stale library. The library
is renamed into place, so several processes may build it at the same time. If there is no compiler, or the build fails,
the torch path is used and one line of the log says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

Backend = Literal["auto", "compiled", "torch"]

COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: a fused multiply-add rounds differently from torch's separate operators. Never -ffast-math.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
NATIVE = ("-march=native",)
BUILD_TIMEOUT = 300  # seconds

THREADED_ELEMENTS = 1 << 18
"""Elements per thread below which another thread does not pay off (`PER_THREAD` in kernels/roundoff.cpp)."""

_PRIVATE = "roundoff-"  # prefix of the name of a private temporary directory

_choice: ContextVar[Backend] = ContextVar("roundoff_backend", default="auto")


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded on this machine; the message is one line."""


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
    path: Path
    """File of the library."""


@contextlib.contextmanager
def use_backend(choice: Backend) -> Iterator[None]:
    """Fix the path that numerics take on the CPU inside the block.

    Args:
        choice: "compiled", "torch", or "auto" (compiled if possible).

    Raises:
        ValueError: if there is no such path.
        BuildError: if `choice` is "compiled" and the kernels cannot be built.
    """
    if choice not in ("auto", "compiled", "torch"):
        raise ValueError(f'the backend must be "auto", "compiled" or "torch", but is {choice!r}')
    if choice == "compiled":
        build()
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def kernels_for(x: Shaped[Tensor, " ..."]) -> Kernels | None:
    """The compiled kernels for work on this tensor, or None if plain torch is to be used."""
    if torch.compiler.is_compiling() or not x.is_cpu or _choice.get() == "torch":
        return None
    return available_kernels()


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
        logging.getLogger("roundoff").warning("roundoff: %s; using the slower pure-torch path", error)
        return None


@functools.cache
def build() -> Kernels:
    """Load the kernels, after compiling them if they are not in the cache.

    Raises:
        BuildError: if there is no compiler, if it fails, or if there is no writable directory.
    """
    compiler = find_compiler(COMPILERS)
    directory = cache_directory()
    try:
        return load(compile_kernels(directory, compiler))
    finally:
        if directory.name.startswith(_PRIVATE):  # no later process would find it
            shutil.rmtree(directory, ignore_errors=True)


def find_compiler(names: tuple[str, ...]) -> str:
    """Path of the first of the named C++ compilers that is installed.

    Raises:
        BuildError: if none is.
    """
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)})")


def cache_directory() -> Path:
    """The user's cache directory (XDG Base Directory specification), or a private temporary one if that is read-only.

    Raises:
        BuildError: if neither is writable.
    """
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roundoff"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: a user without a home directory
        pass
    try:
        return Path(tempfile.mkdtemp(prefix=_PRIVATE))
    except OSError as error:
        raise BuildError(f"there is no directory to compile the kernels in ({error})") from None


def _sources() -> list[Path]:
    """The C++ files, in the order in which they enter the hash."""
    folder = Path(__file__).parent / "kernels"
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def cpu_description() -> str:
    """What `-march=native` depends on: the model and the instruction set flags of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # The first two on x86, the others on ARM.
    fields = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=BUILD_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]} did not run ({error})") from None


def compile_kernels(directory: Path, compiler: str) -> Path:
    """Path of the library in `directory` for this source, compiler and CPU; it is compiled if it does not exist.

    Raises:
        BuildError: if the compiler fails, or `directory` is not writable.
    """
    sources = _sources()
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = _run([compiler, "--version"]).stdout
    for part in (compiler, version, *FLAGS, *NATIVE, platform.machine(), cpu_description()):
        digest.update(part.encode() + b"\0")
    library = directory / f"kernels-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    source = next(path for path in sources if path.name == "roundoff.cpp")
    try:
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=directory)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"the kernels cannot be compiled into {directory} ({error})") from None
    try:
        for flags in ((*FLAGS, *NATIVE), FLAGS):
            result = _run([compiler, *flags, "-o", temporary, str(source)])
            if result.returncode == 0:
                Path(temporary).replace(library)
                return library
    finally:
        Path(temporary).unlink(missing_ok=True)
    reason = next((line for line in result.stderr.splitlines() if "error" in line), f"status {result.returncode}")
    raise BuildError(f"compiling the kernels with {compiler} failed ({reason.strip()})")


def load(library: Path) -> Kernels:
    """Load a compiled library.

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
    attend.argtypes = [pointer, pointer, pointer, single, integer]
    fingerprint = handle.ro_fingerprint
    fingerprint.argtypes = [pointer, pointer, long, long, long, pointer]
    fingerprints = handle.ro_fingerprints
    fingerprints.argtypes = [pointer, long, long, long, pointer]
    for function in (quantize, noise, draw, norm, gate, attend, fingerprint, fingerprints):
        function.restype = None
    return Kernels(quantize, noise, draw, norm, gate, attend, fingerprint, fingerprints, library)
