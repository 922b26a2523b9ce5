"""What the pages for contributors name is there: files in backticks, modules, links, and every page in the index."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from tests.printed_samples import PAGES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "roundoff"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOLDERS = ("src/", "tests/", "docs/", "examples/", "benchmarks/")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
BACKTICKS = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)+/?|[\w.-]+/|[\w-]+\.(py|md|cff)|pyproject\.toml|Makefile")
MODULE = re.compile(r"roundoff(\.[a-z_]\w*)+")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]+)?\)")


def quoted(text: str) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return BACKTICKS.findall(FENCED.sub("", text))


def paths(text: str) -> list[str]:
    """The paths among it: names with a slash, or with the suffix of a file of the repository."""
    return [name for name in quoted(text) if PATH.fullmatch(name)]


def exists(name: str) -> bool:
    """Whether a path, or a pattern with `*`, names something from the root of the repository or of the package."""
    return any(next(root.glob(name.rstrip("/")), None) is not None for root in (ROOT, SOURCE))


def links(page: Path) -> list[tuple[Path, str]]:
    """Each relative link of a page: the file that it leads to, and its anchor without `#` ("" for none)."""
    found = LINK.findall(FENCED.sub("", page.read_text("utf-8")))
    return [((page.parent / to).resolve(), anchor[1:]) for to, anchor in found if "://" not in to]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [CONTRIBUTING, ARCHITECTURE], ids=lambda page: page.name)
def test_every_path_in_backticks_exists(page: Path):
    text = page.read_text("utf-8")
    assert [name for name in paths(text) if not exists(name)] == []
    modules = [name for name in quoted(text) if MODULE.fullmatch(name)]
    assert [name for name in modules if not names_a_module(name)] == []


def test_every_function_in_the_index_is_in_the_file_beside_it():
    index = ARCHITECTURE.read_text("utf-8").partition("## Index")[2]
    named = re.findall(r"`(src/[\w/.]+)` \(`(\w+)`\)", index)
    assert len(named) >= 10
    assert [
        (file, name) for file, name in named if not re.search(rf"^(def )?{name}\b", (ROOT / file).read_text(), re.M)
    ] == []


def names_a_module(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    path = SOURCE.joinpath(*name.split(".")[1:])
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    return importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), attribute)


def test_paths_are_told_from_other_words():
    text = "`src/roundoff/cli.py`, `tests/golden/`, `.ci/run`, `<family>/<id>.toml`, `make test`, `missing.py`, `1 / n`"
    assert paths(text) == ["src/roundoff/cli.py", "tests/golden/", ".ci/run", "missing.py"]
    assert [name for name in paths(text) if not exists(name)] == ["missing.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path):
    named = [name for name in paths(page.read_text("utf-8")) if name.startswith(FOLDERS)]
    assert [name for name in named if not exists(name)] == []


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    broken = [
        f"{target}#{anchor}"
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]
    assert broken == []


def test_the_index_links_every_page():
    linked = {target for target, _ in links(ROOT / "docs" / "index.md")}
    pages = {*ROOT.glob("docs/*.md"), CONTRIBUTING, ROOT / "CHANGELOG.md", ROOT / "README.md"}
    assert pages - {ROOT / "docs" / "index.md"} <= linked
