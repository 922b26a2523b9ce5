"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME...` (or `all`) runs them in turn.

Options after the last name belong to it: `python -m benchmarks gpu --parts a,c`. A benchmark takes options if it has a
function `parser`, whose result its `main` gets.
"""

import ast
import importlib
import sys
from pathlib import Path

import torch

from roundoff.numerics.backend import computed_by
from roundoff.runs.provenance import machine

ALONE = ("gpu", "real")
"""Benchmarks that `all` leaves out: they need a device, or the network."""


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


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
