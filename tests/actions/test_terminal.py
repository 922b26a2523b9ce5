"""What is printed arrives on streams of any encoding and width; closed and unread streams are no error."""

import codecs
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from roundoff.actions.terminal import SUBSTITUTE, TolerantStream, plain_form, show, tolerant_streams
from tests.program import roundoff as in_this_process

FIGURES = "−9.2 ± 1.5 → 63.7 %"
ENCODINGS = ["utf-8", "latin-1", "cp1252", "ascii"]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "−1 ± 2 → é … 语"),
        ("latin-1", "-1 ± 2 -> é ... \\u8bed"),
        ("cp1252", "-1 ± 2 -> é … \\u8bed"),
        ("ascii", "-1 +/- 2 -> \\xe9 ... \\u8bed"),
    ],
)
def test_every_character_is_printed_in_some_form(encoding, expected):
    codecs.register_error(SUBSTITUTE, plain_form)
    raw = io.BytesIO()
    plain = io.TextIOWrapper(raw, encoding=encoding)
    stream = TolerantStream(plain)
    print("−1 ± 2 → é … 语", file=stream)
    assert raw.getvalue() == f"{expected}\n".encode(encoding)


def test_streams_are_put_back_and_stay_open(capfd):
    before = sys.stdout
    with tolerant_streams():
        print("inside")
    assert sys.stdout is before
    print("after")
    assert capfd.readouterr().out == "inside\nafter\n"


MARKED = "[red]a[/red] [1] :warning: [/] a-name-that-is-longer-than-the-column-that-it-is-to-stand-in-by-far-and-more"


def test_nothing_that_a_user_wrote_is_markup_and_no_word_is_cut(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("name", "title")
    table.add_row(MARKED, Text(MARKED))
    show(Group(table, MARKED))
    printed = capfd.readouterr().out
    assert "…" not in printed
    for word in ("[red]a[/red]", "[1]", ":warning:", "[/]"):
        assert printed.count(word) == 3
    assert max(map(len, printed.splitlines())) <= 80


def roundoff(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("LC_")} | environment
    return subprocess.run(
        [sys.executable, "-m", "roundoff", *arguments], env=settings, capture_output=True, check=False, timeout=120
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_commands_print_in_the_encoding_of_the_stream(tmp_path, encoding):
    """A title with characters of every kind: in the table of experiments, in the report's, in its files."""
    file = tmp_path / "scores.csv"
    file.write_text(f"id,baseline,score\nplain,,70.0\n{FIGURES},plain,80.0\n", encoding="utf-8")
    done = roundoff("import-table", str(file), "--n", "1000", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode(encoding)
    assert "63.7 %" in printed
    assert ("−9.2" in printed) == (encoding == "utf-8")
    assert "-9.2" in printed.replace("−", "-")


SETTINGS = [
    {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
    {"TERM": "dumb", "COLUMNS": "80"},
    {"NO_COLOR": "1", "PYTHONIOENCODING": "cp1252"},
]


@pytest.fixture(scope="module")
def plan():
    return roundoff("plan", "--effect", "5", "--runs", "nowhere", PYTHONIOENCODING="utf-8").stdout.decode()


@pytest.mark.parametrize("environment", SETTINGS)
def test_a_plan_is_whole_whatever_the_terminal(environment, plan):
    done = roundoff("plan", "--effect", "5", "--runs", "nowhere", **environment)
    assert done.returncode == 0, done.stderr
    encoding = environment.get("PYTHONIOENCODING", "ascii" if "LANG" in environment else "utf-8")
    figures = [word for word in plan.split() if word.isdecimal()]
    printed = done.stdout.decode(encoding)
    assert [word for word in printed.split() if word.isdecimal()] == figures
    assert "…" not in printed


@pytest.mark.parametrize("command", [["list"], ["plan", "--effect", "5"], ["show", "quickstart", "--no-layers"]])
def test_a_reader_that_leaves_is_no_error(command):
    process = subprocess.Popen(
        [sys.executable, "-m", "roundoff", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=120), errors) == (0, b"")


def test_a_reader_that_leaves_keeps_no_file_from_being_written(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        few = "--set=profile.task.settings.test_problems=2"
        done = in_this_process("eval", "tiny", few, "--out", "s.json", cwd=tmp_path, stdout=stdout)
    assert (tmp_path / "s.json").is_file()
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_commands_end_well_with_closed_streams(closed):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m roundoff list {closed}"], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_files_and_programs_are_read_as_utf_8_whatever_the_locale():
    """Every text file is opened, and every program's output decoded, with an encoding that is named."""
    import ast

    found = []
    root = Path(__file__).parents[2]
    for path in [p for part in ("src", "benchmarks", "examples") for p in (root / part).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and _reads_text_by_locale(node):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []


def _reads_text_by_locale(call) -> bool:
    import ast

    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    constants = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name == "read_text":
        return "encoding" not in given and not call.args
    if name == "write_text":
        return "encoding" not in given and len(call.args) < 2
    if name == "open":
        of_os = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("os", "tarfile", "gzip")
        return "encoding" not in given and not any("b" in value for value in constants) and not of_os
    if name in ("run", "Popen", "check_output"):
        return any(k.arg == "text" for k in call.keywords) and "encoding" not in given
    return False
