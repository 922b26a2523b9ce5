"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME...` (or `all`) runs them in turn."""

import importlib
import sys
from pathlib import Path

import torch

from roundoff.numerics.backend import computed_by
from roundoff.runs.provenance import machine

ALONE = ("real",)
"""Benchmarks that `all` leaves out: they need the network."""


def available() -> dict[str, str]:
    """Name of each benchmark and the first line of its docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith("_") and "\ndef main(" in path.read_text("utf-8"):
            found[path.stem] = (importlib.import_module(f"benchmarks.{path.stem}").__doc__ or "").splitlines()[0]
    return found


def run(names: list[str]) -> int:
    """Run the benchmarks named; without a name, list them."""
    known = available()
    if not names:
        for name, title in known.items():
            print(f"{name:12} {title}")
        return 0
    print(f"processor: {machine()['processor']}; on the CPU computes: {computed_by(torch.ones(1))}")
    for name in [n for n in known if n not in ALONE] if names == ["all"] else names:
        if name not in known:
            print(f"there is no benchmark {name!r} (known: {', '.join(known)})", file=sys.stderr)
            return 2
        print(f"\n# {name}: {known[name]}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
