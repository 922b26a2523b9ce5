"""The blocks of README.md and docs/*.md that show what a program printed, and the comment before each that says how.

A block without a language that is more than commands needs one of these comments on a line of its own before it:

    <!-- printed by: roundoff list -->            run again by the suite, and compared
    <!-- printed by the Python above -->          the same, of the Python block before it
    <!-- printed on: PROCESSOR, DATE -->          takes long, or depends on the machine: where and when it was
    <!-- message of: tests/FILE.py -->            an error or a warning, and the test that sees it
    <!-- not printed -->                          a formula, or a layout of files

`[...]` or `...` alone on a line of a sample stands for any lines that are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"roundoff(?!:)|torchrun|python|make|source|git|cd|pip|ray|wandb|bash|mkdir|export|srun|sbatch"
COMMAND = re.compile(rf"(\$ )?(\w+=\S+ )*({PROGRAMS})\b|#")
MARK = re.compile(r"<!-- (.*) -->")
PRINTED_ON = re.compile(r"printed on: .*\w.*, \d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class Sample:
    """One block that is more than commands."""

    page: Path
    line: int
    """Of its first line, from 1."""
    text: str
    mark: str
    """Content of the comment before it; empty where there is none."""
    python: str
    """The last Python block before it on the page."""

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def samples() -> list[Sample]:
    """All of README.md and the documentation."""
    return [sample for page in PAGES for sample in _of_page(page)]


def _of_page(page: Path) -> Iterator[Sample]:
    mark, python = "", ""
    for line, language, text in _blocks(page.read_text("utf-8")):
        if language == "comment":
            mark = text
            continue
        if language == "python":
            python = text
        if language in ("", "text", "console", "sh", "bash") and not _is_commands(text):
            yield Sample(page, line, text, mark, python)
        if language != "prose" or text:
            mark = ""


def _blocks(content: str) -> Iterator[tuple[int, str, str]]:
    """Line, language (`""` for an indented block, `prose`, `comment`) and text of each part of a page."""
    lines = content.splitlines()
    at, in_list = 0, False
    while at < len(lines):
        line, start = lines[at], at
        if line.startswith("```"):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].startswith("```"))
            yield start + 1, line.strip("` "), "\n".join(lines[at + 1 : end])
            at = end + 1
        elif line.startswith("    ") and line.strip() and not in_list and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield start + 1, "", "\n".join(text.removeprefix("    ") for text in lines[start:at]).rstrip()
        else:
            found = MARK.fullmatch(line.strip())
            in_list = bool(re.match(r"\s*([-*]|\d+\.) ", line)) or (in_list and (not line or line.startswith(" ")))
            yield start + 1, "comment" if found else "prose", found[1] if found else line.strip()
            at += 1


def _is_commands(text: str) -> bool:
    """Whether a block holds nothing but commands, their continuations and comments."""
    continued = False
    for line in text.splitlines():
        if line.strip() and not continued and not COMMAND.match(line):
            return False
        continued = line.rstrip().endswith("\\")
    return True
