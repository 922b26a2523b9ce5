"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME...` (or `all`) runs them in turn.

`--target avx2` takes the kernels of another target than the processor's widest, or `--target torch` none. It does not
reach benchmarks that start processes of their own (quickstart, parallel, ray_grid, real), which are refused with it.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from roundoff.numerics.backend import computed_by, use_backend
from roundoff.runs.provenance import machine

ALONE = ("real",)
"""Benchmarks that `all` leaves out: they need the network."""
STARTS_PROCESSES = ("quickstart", "parallel", "ray_grid", "real")
"""Benchmarks whose work is done by other processes, which choose their kernels themselves."""


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


def main(arguments: list[str]) -> int:
    """Read the command line, and run under the target that it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, or `all`; none lists them")
    parser.add_argument("--target", default="auto", help="kernels to measure, such as avx2; or torch")
    options = parser.parse_args(arguments)
    unreached = [name for name in STARTS_PROCESSES if name in options.names]
    if options.target != "auto" and (unreached or options.names == ["all"]):
        parser.error(f"--target does not reach the processes that {', '.join(unreached) or '`all`'} would start")
    try:
        with use_backend(options.target):
            return run(options.names)
    except ValueError as error:
        if "the backend must be" not in str(error):
            raise
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
