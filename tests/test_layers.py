"""Imports go downwards only, as docs/architecture.md draws the floors; what must start fast does not import torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "roundoff"
PAGE = ROOT / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """Each room (package or module at the root) with the number of its floor, the lowest being 0; the page has it."""
    drawn = re.search(r"<!-- not printed: the floors.*?-->\n+```text\n(.*?)\n```", PAGE.read_text("utf-8"), re.DOTALL)
    assert drawn is not None
    rows = [line.split("  ")[0].split() for line in drawn[1].splitlines()]
    return {room: number for number, row in enumerate(reversed(rows)) for room in row}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(text: str) -> set[str]:
    """Modules of roundoff that a file imports, without the package's own name; names of modules among them."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roundoff":
            found |= {f"{node.module}.{alias.name}".removeprefix("roundoff.") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("roundoff.") for a in node.names if a.name.startswith("roundoff.")}
    return found - {"__version__"}


def violations(files: dict[Path, str]) -> list[str]:
    """Imports of a room on the same floor or a higher one."""
    floor = floors()
    return sorted(
        {
            f"{here} (floor {floor[here]}) imports {room} (floor {floor[room]})"
            for path, text in files.items()
            for room in {name.split(".")[0] for name in imported_modules(text)}
            if (here := room_of(path)) != room and floor[room] >= floor[here]
        }
    )


def sources() -> dict[Path, str]:
    return {p: p.read_text("utf-8") for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"}


def test_every_room_has_a_floor_and_none_imports_upwards_or_sideways():
    files = sources()
    assert {room_of(p) for p in files} == set(floors())
    assert violations(files) == []


def test_an_upward_import_is_found():
    text = "from roundoff.training.loop import train\nimport roundoff.config.base"
    (found,) = violations({SOURCE / "config" / "base.py": text})
    assert re.fullmatch(r"config \(floor \d+\) imports training \(floor \d+\)", found)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    found = []
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        if start in seen:
            found.append(start)
    return sorted(found)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def runtime_imports(text: str) -> str:
    """The text without what is imported for type checkers alone."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def test_no_modules_import_each_other_in_a_circle():
    files = sources()
    modules = {module_of(p) for p in files}
    graph = {}
    for path, text in files.items():
        names = imported_modules(runtime_imports(text))
        graph[module_of(path)] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def doors(room: str) -> set[str]:
    """What other rooms may import from a package: modules that its docstring names as doors, and what it exports."""
    tree = ast.parse((SOURCE / room / "__init__.py").read_text("utf-8"))
    text = ast.get_docstring(tree) or ""
    assert "Doors:" in text, f"roundoff.{room} does not say which its doors are"
    if "Doors: every module" in text:
        return {path.stem for path in (SOURCE / room).iterdir()}
    named = {name.split(".")[0] for name in re.findall(r"`([\w.]+)`", text.partition("Doors:")[2])}
    return named | {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_other_rooms_use_the_doors_of_a_package_alone():
    used: dict[str, set[str]] = {}
    for path, text in sources().items():
        for name in imported_modules(text):
            room, *inside = name.split(".")
            is_module = inside and any(
                (SOURCE / room / f"{inside[0]}{end}").exists() for end in (".py", "/__init__.py")
            )
            if is_module and room != room_of(path):
                used.setdefault(room, set()).add(inside[0])
    assert {room: names for room, found in used.items() if (names := sorted(found - doors(room)))} == {}


def test_no_file_is_over_350_lines():
    long = {
        str(p): n
        for folder in (SOURCE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples")
        for p in folder.rglob("*")
        if p.suffix in (".py", ".cpp", ".h") and (n := len(p.open(encoding="utf-8").readlines())) > 350
    }
    assert long == {}


@pytest.mark.parametrize(
    "module",
    [
        "roundoff.cli",
        "roundoff.experiments",
        "roundoff.runs.directory",
        "roundoff.report.render",
        "roundoff.stats",
        "roundoff.aqn.schedule",
        "roundoff.planning.seeds",
    ],
)
def test_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_imported():
    import roundoff

    for name in roundoff.__all__:
        assert getattr(roundoff, name) is not None
