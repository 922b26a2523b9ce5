"""What the documentation shows as printed is what is printed, or says where and when it was."""

import contextlib
import io
import re
import runpy
import shlex

import pytest

from tests.printed_samples import PRINTED_ON, ROOT, Sample, samples
from tests.program import roundoff

KINDS = ("printed by: ", "printed by the Python above", "printed on: ", "message of: ", "not printed")
LEFT_OUT = re.compile(r"\[?\.\.\.\]?")
MEASURED = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
TOLERANCE = 0.05
"""Relative: a measured figure differs in its last digits between kinds of processors, which sum in another order."""
POINTS = 2.0
"""A score in percent: another order of sums may answer a few of 256 problems otherwise."""
REGENERATED = [sample for sample in samples() if sample.mark.startswith("printed by")]


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.place)
def test_every_sample_says_where_it_is_from(sample: Sample):
    said = f"{sample.place}: the comment before this block must be one of those of tests/printed_samples.py"
    assert sample.mark.startswith(KINDS), said
    if sample.mark.startswith("printed on: "):
        assert PRINTED_ON.fullmatch(sample.mark), f"{sample.place}: name the processor and the date, as 2026-11-23"
    if sample.mark.startswith("message of: "):
        assert (ROOT / sample.mark.removeprefix("message of: ")).is_file()


@pytest.mark.parametrize("sample", REGENERATED, ids=lambda sample: sample.place)
def test_a_sample_is_what_is_printed_today(sample: Sample, tmp_path):
    if sample.mark.startswith("printed by: "):
        name, *arguments = shlex.split(sample.mark.removeprefix("printed by: "))
        assert name == "roundoff"
        printed = roundoff(*arguments, cwd=tmp_path, COLUMNS="100").stdout
    else:
        (tmp_path / "sample.py").write_text(sample.python, encoding="utf-8")
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as output:
            runpy.run_path("sample.py", run_name="__main__")
        printed = output.getvalue()
    shown = [line for line in sample.text.splitlines() if not line.startswith("$ ")]
    missing = first_missing(shown, printed.splitlines())
    assert missing is None, f"{sample.place} shows {missing!r}, which is not printed there today"


def first_missing(shown: list[str], printed: list[str]) -> str | None:
    """The first line that is shown and not printed where it should be; None where all are."""
    shown = [line.rstrip() for line in shown]
    printed = [line.rstrip() for line in printed]
    while printed and not printed[-1]:
        printed.pop()
    at, anywhere = 0, False
    for line in shown:
        if LEFT_OUT.fullmatch(line):
            anywhere = True
            continue
        if anywhere:
            at = next((n for n in range(at, len(printed)) if alike(line, printed[n])), len(printed))
        if at == len(printed) or not alike(line, printed[at]):
            return line
        at, anywhere = at + 1, False
    return None if at == len(printed) or anywhere else "<the end>"


def alike(shown: str, printed: str) -> bool:
    """Whether two lines have the same words and whole numbers, and measured figures that agree."""
    if MEASURED.sub("#", shown) != MEASURED.sub("#", printed):
        return False
    pairs = zip(MEASURED.finditer(shown), MEASURED.finditer(printed), strict=True)
    return all(_agree(a, b, percent=shown[a.end() :].lstrip().startswith("%")) for a, b in pairs)


def _agree(shown: re.Match, printed: re.Match, *, percent: bool) -> bool:
    a, b = float(shown[0]), float(printed[0])
    return abs(a - b) <= (POINTS if percent else TOLERANCE * max(abs(a), abs(b)))


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\nb", "a\nb", None),
        ("a\n...\nd", "a\nb\nc\nd", None),
        ("...\nd", "a\nd\n", None),
        ("a\n[...]", "a\nb", None),
        ("a", "a\nb", "<the end>"),
        ("a\nb", "a", "b"),
        ("kl 0.1234", "kl 0.1236", None),
        ("kl 0.1234", "kl 0.2", "kl 0.1234"),
        ("48.0 %", "49.5 %", None),
        ("48.0%", "51.5%", "48.0%"),
        ("42 modules", "43 modules", "42 modules"),
    ],
)
def test_samples_are_compared_line_by_line(shown, printed, expected):
    assert first_missing(shown.splitlines(), printed.splitlines()) == expected
