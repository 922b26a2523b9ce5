"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME...` (or `all`) runs them in turn.

Options after the last name belong to it: `python -m benchmarks gpu --parts a,c`. A benchmark takes options if it has a
function `parser`, whose result its `main` gets.

Before the first name, `--target avx2` takes the kernels of another target than the processor's widest, or
`--target torch` none. It does not reach benchmarks that start processes of their own, which are refused with it.
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

import torch

from roundoff.numerics.backend import computed_by, use_backend
from roundoff.runs.provenance import machine

ALONE = ("gpu", "real")
"""Benchmarks that `all` leaves out: they need a device, or the network."""
STARTS_PROCESSES = ("quickstart", "parallel", "ray_grid", "gpu", "real")
"""Benchmarks whose work is done by other processes, which choose their kernels themselves, or on a device."""


def available() -> dict[str, str]:
    """Name of each benchmark and the first line of its docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        if not path.stem.startswith("_") and "\ndef main(" in text:  # read, not imported: one may lack a package
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The names among some words, and the options of the last of them."""
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def run(words: list[str]) -> int:
    """Run the benchmarks named; without a name, list them. Returns the exit code: the first that is not 0."""
    known = available()
    names, options = split(words)
    if not names and not options:
        for name, title in known.items():
            print(f"{name:12} {title}")
        return 0
    chosen = [name for name in known if name not in ALONE] if names == ["all"] else names
    for name in chosen:
        if name not in known:
            print(f"there is no benchmark {name!r} (known: {', '.join(known)})", file=sys.stderr)
            return 2
    if options and not (names and hasattr(importlib.import_module(f"benchmarks.{chosen[-1]}"), "parser")):
        print(f"{names[-1] if names else 'python -m benchmarks'} takes no options, but got {options}", file=sys.stderr)
        return 2
    print(f"processor: {machine()['processor']}; on the CPU computes: {computed_by(torch.ones(1))}")
    codes = []
    for name in chosen:
        module = importlib.import_module(f"benchmarks.{name}")
        own = [module.parser().parse_args(options if name == chosen[-1] else [])] if hasattr(module, "parser") else []
        print(f"\n# {name}: {known[name]}\n", flush=True)
        codes.append(module.main(*own) or 0)
    return next((code for code in codes if code), 0)


def main(arguments: list[str]) -> int:
    """Read the target from the command line, and run the rest under it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="auto", help="kernels to measure, such as avx2; or torch")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME", help="benchmarks to run; none lists them")
    options = parser.parse_args(arguments)
    unreached = [name for name in STARTS_PROCESSES if name in options.words]
    if options.target != "auto" and (unreached or options.words == ["all"]):
        parser.error(f"--target does not reach the processes that {', '.join(unreached) or '`all`'} would start")
    try:
        with use_backend(options.target):
            return run(options.words)
    except ValueError as error:
        if "the backend must be" not in str(error):
            raise
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
