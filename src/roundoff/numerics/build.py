"""Building the compiled kernels: one shared library for each kind of processor, from one C++ source.

A processor is known by its vector instructions: AVX-512, AVX2 or neither on x86, NEON on ARM. Each such **target** is
compiled with flags of its own, and the widest one that the processor has is chosen at run time, so that one
installation serves machines that differ. The bits are the same on every target.

Where the libraries are:

1. Beside the source, when the package was installed with a C++ compiler at hand (`setup.py` compiles every target).
2. In the user's cache directory otherwise, compiled at first use; one line says so, and how long it took.

The file's name holds the target and a hash of the source and the flags, so that a changed source never meets a stale
library. A library is renamed into place, and a lock lets one process build while others wait. Nothing but the standard
library is imported here: `setup.py` runs this module before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from roundoff.errors import RoundoffError

SOURCES = Path(__file__).parent / "kernels"
PACKAGED = SOURCES / "compiled"
"""The directory of the libraries that were compiled when the package was installed."""
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: a fused multiply-add rounds differently from torch's separate operators. Never -ffast-math.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-w")
BUILD_TIMEOUT = 300
"""Longest time that a compiler may take (s)."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
TARGETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {"avx512": _AVX512, "avx2": _AVX2, "sse2": ()},
    "aarch64": {"neon": ()},
}
"""Flags of each target by kind of machine, the widest target first. Other machines have the target `generic`."""
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}
PRIVATE = "roundoff-"
"""The beginning of the name of a private directory, which is removed after use."""


class BuildError(RoundoffError, RuntimeError):
    """The kernels cannot be compiled or loaded here; the message is one line."""


def targets(machine: str | None = None) -> Mapping[str, tuple[str, ...]]:
    """Flags of each target of a kind of machine (by default this one), the widest target first."""
    name = (machine or platform.machine()).lower()
    return TARGETS.get(NAMES.get(name, name), {"generic": ()})


def targets_for(capability: str) -> list[str]:
    """The targets that a processor can run, the widest first.

    Args:
        capability: as `torch.backends.cpu.get_cpu_capability()` names it: AVX512, AVX2, or another word for neither.
    """
    names = list(targets())
    widest = capability.lower()
    return names[names.index(widest) if widest in names else -1 :]


def library_name(target: str, flags: tuple[str, ...]) -> str:
    """File name of the library of a target: target, machine, and a hash of the source and the flags."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (*FLAGS, *flags, sys.platform):
        digest.update(part.encode() + b"\0")
    return f"kernels-{target}-{platform.machine().lower()}-{digest.hexdigest()[:16]}.so"


@contextlib.contextmanager
def library_for(target: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The library of a target, to be loaded inside the block; it is compiled now if it is not there yet.

    Args:
        target: a name among `targets()`.
        say: receives one line after a compilation.

    Raises:
        BuildError: if there is no compiler, it fails, or there is nowhere to write.
    """
    packaged = PACKAGED / library_name(target, targets()[target])
    if packaged.exists():
        yield packaged
        return
    compiler = find_compiler(COMPILERS)
    directory = cache_directory()
    try:
        yield compile_once(directory, compiler, target, say)
    finally:
        if directory.name.startswith(PRIVATE):  # no other process would find it
            shutil.rmtree(directory, ignore_errors=True)


def compile_once(directory: Path, compiler: str, target: str, say: Callable[[str], None]) -> Path:
    """The library of a target in `directory`; one process compiles it while others wait."""
    library = directory / library_name(target, targets()[target])
    if library.exists():
        return library
    with _locked(directory / f"{library.name}.lock"):
        if not library.exists():  # otherwise another process has compiled it meanwhile
            began = time.perf_counter()
            compile_target(directory, compiler, target)
            seconds = time.perf_counter() - began
            say(f"compiled the kernels for {target} in {seconds:.0f} s, once for this machine")
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock among processes, where the system has one; without, several may compile, and the last one is kept."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise BuildError(f"the kernels cannot be compiled into {path.parent} ({error})") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_target(directory: Path, compiler: str, target: str) -> Path:
    """Compile the library of a target into `directory`.

    Raises:
        BuildError: naming the compiler's first error.
    """
    flags = targets()[target]
    library = directory / library_name(target, flags)
    source = SOURCES / "roundoff.cpp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=directory)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"the kernels cannot be compiled into {directory} ({error})") from None
    try:
        result = _run([compiler, *FLAGS, *flags, "-o", temporary, str(source)])
        if result.returncode == 0:
            Path(temporary).chmod(0o755)
            Path(temporary).replace(library)
            return library
    finally:
        Path(temporary).unlink(missing_ok=True)
    reason = next((line for line in result.stderr.splitlines() if "error" in line), f"status {result.returncode}")
    raise BuildError(f"compiling the kernels with {compiler} failed ({reason.strip()})")


def find_compiler(names: tuple[str, ...]) -> str:
    """The path of the first C++ compiler among these names.

    Raises:
        BuildError: if none of them is there.
    """
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)})")


def cache_directory() -> Path:
    """The user's cache directory (XDG Base Directory specification), or a private temporary one if it is read-only.

    Raises:
        BuildError: if neither can be written to.
    """
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roundoff"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: a user without a home directory
        pass
    try:
        return Path(tempfile.mkdtemp(prefix=PRIVATE))
    except OSError as error:
        raise BuildError(f"there is no directory to compile the kernels in ({error})") from None


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=BUILD_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]} did not run ({error})") from None
