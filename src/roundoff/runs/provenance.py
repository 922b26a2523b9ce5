"""What a run records so that someone else can repeat it: versions, machine, commit and command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import roundoff

PACKAGES = ("roundoff", "torch", "transformers", "peft", "numpy", "tokenizers", "safetensors")


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Versions, machine, commit of roundoff's source tree (None outside of one) and command (by default this one)."""
    arguments = command or sys.argv
    name = Path(arguments[0]).name
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["roundoff" if name == "__main__.py" else name, *arguments[1:]]),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "machine": machine(),
        "commit": _commit(),
    }


def machine() -> dict[str, str]:
    """Operating system and processor of the machine that this process runs on."""
    return {"system": platform.system(), "processor": _processor()}


def package_version(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The model name of the processor, since the bits of a result can depend on its vector units."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with `+changes` if files differ from it."""
    tree = Path(roundoff.__file__).parents[2]
    if not (tree / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tree), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
