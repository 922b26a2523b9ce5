"""`roundoff scan` as a user meets it."""

import json
import subprocess
import sys
from io import StringIO
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from rich.console import Console

from roundoff.commands.scan import scan_command
from roundoff.config import ConfigError
from roundoff.report.scan_picture import scan_picture
from roundoff.report.scan_tables import fault_lines, linear_table, scan_table


def run(*arguments, check=0):
    done = CliRunner().invoke(scan_command, ["tiny", "--tokens", "64", *arguments], catch_exceptions=False)
    assert done.exit_code == check, done.output
    return done.output


def test_a_scan_prints_its_tables_and_writes_json_and_a_picture(tmp_path):
    json_file, picture = tmp_path / "scan.json", tmp_path / "scan.svg"
    shown = run("--multipliers", "targeted", "--frontier", "--json", str(json_file), "--picture", str(picture))
    assert "ranking by gradient score" in shown and "rank correlation of the two halves" in shown
    assert "k layers kept in high precision" in shown
    data = json.loads(json_file.read_text())
    assert data["title"] == "weight mxfp4, activation mxfp4"
    assert sum(data["multipliers"]["layers"].values()) == 1.0
    assert [point["k"] for point in data["frontier"]][:2] == [0, 1]
    cells = ElementTree.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(cells) == 1 + len(data["layers"]) * len(data["metrics"])


def test_noise_alone_has_no_format():
    shown = run("--noise", "0.05", "--no-gradient")
    assert "ranking by shadow score" in shown
    assert "energy" not in shown.split("Linears")[0]


def test_hardware_of_an_experiment():
    assert "quickstart-mxfp4" in run("--hardware", "quickstart-mxfp4", "--no-gradient")


def test_a_healthy_machine_has_no_faults(tmp_path):
    shown = run("--faults", "--json", str(tmp_path / "faults.json"))
    assert "0 alarms" in shown
    assert json.loads((tmp_path / "faults.json").read_text())["suspect"] is None


def test_a_fault_is_an_exit_code(monkeypatch):
    from roundoff.srdd import fault_search as faults

    monkeypatch.setattr(faults.checks, "CHECKSUM_LIMIT", 0.0)  # rounding itself is an alarm now
    assert "suspect: model.layers.0.self_attn.q_proj" in run("--faults", check=1)


def test_empty_lines_are_no_texts(tmp_path):
    (tmp_path / "texts").write_bytes("\ufeff1+2=3\r\n\r\n\r\n4+5=9\r\n7-1=6\r\n".encode())
    assert "15 tokens" in run("--texts", str(tmp_path / "texts"), "--no-gradient")
    with pytest.raises(ConfigError, match="all 3 were"):  # else those after the empty lines would be seen twice
        run("--texts", str(tmp_path / "texts"), "--frontier")
    (tmp_path / "latin").write_bytes(b"1+2=3\n\xe9\n")
    with pytest.raises(ConfigError, match="latin is not UTF-8"):
        run("--texts", str(tmp_path / "latin"))


def test_texts_of_a_file(tmp_path):
    (tmp_path / "texts").write_text("1+2=3\n4+5=9\n7-1=6\n")
    assert "15 tokens" in run("--texts", str(tmp_path / "texts"), "--no-gradient")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no token"):
        run("--texts", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="--frontier needs texts that the ranking did not see"):
        run("--texts", str(tmp_path / "texts"), "--frontier")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "mxfp5"], "did you mean 'mxfp4'"),
        (["--format", "mxfp4", "--weight", "nvfp4"], "use either it, or --weight and --activation"),
        (["--hardware", "quickstart-mxfp4", "--noise", "0.1"], "--hardware names formats and noise already"),
        (["--noise", "5"], r"must be in \[0, 1\) \(5 % is 0.05\)"),
        (["--rank-by", "gradiant"], "did you mean 'gradient'"),
        (["--multipliers", "targetd", "--no-gradient"], "--multipliers must be .* did you mean 'targeted'"),
        (["--task", "gsm9k"], "task.name must be one of"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_wrong_format_of_both_is_said_once():
    with pytest.raises(ConfigError) as refused:
        run("--format", "mxfp5")
    assert str(refused.value).startswith("--format must be a number format; did you mean 'mxfp4'? (known: mxfp4, ")
    assert str(refused.value).count("mxfp5") == 1


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="exists: name another file"):
        run("--json", str(tmp_path / "x"))


def test_help_imports_no_torch():
    code = (
        "import sys; from roundoff.cli import cli; cli(['scan', '--help'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_picture_shades_each_column_by_its_damage():
    metric = {"title": "SQNR", "unit": "dB", "meaning": "m", "decibel": True}
    scan = {
        "metrics": {"sqnr": metric, "shadow": metric | {"title": "shadow", "decibel": False}},
        "layers": [{"layer": 0, "sqnr": 20.0, "shadow": 0.1}, {"layer": 1, "sqnr": 10.0, "shadow": 0.1}],
        "ranking": [1, 0],
        "rank_by": "sqnr",
    }
    cells = ElementTree.fromstring(scan_picture(scan, "a < b")).findall("{http://www.w3.org/2000/svg}rect")[1:]
    # SQNR 10 dB is the damaged one (darkest); a constant column stays light.
    assert [cell.get("fill") for cell in cells] == ["#f7fbff", "#08306b", "#f7fbff", "#f7fbff"]


def test_fault_lines_name_the_suspect_first():
    alarm = {"check": "checksum", "site": "layers.1.up", "detail": "off"}
    report = {"alarms": [alarm], "checked": ["a", "b"], "unchecked": ["c"], "suspect": "layers.1.up", "calls": 12}
    lines = fault_lines(report)
    # 1 - 0.9^12 = 0.718, 1 - 0.99^12 = 0.114, 1 - 0.999^12 = 0.012
    assert lines[0].endswith(", 1 alarm")
    assert lines[1].endswith("in 10.0 % of calls: 72 %, 1.0 % of calls: 11 %, 0.1 % of calls: 1 %")
    assert lines[2] == "suspect: layers.1.up (the first in forward order)"
    assert lines[-1] == "not checked: c"


@pytest.mark.parametrize(("width", "tables"), [(60, 3), (80, 2), (200, 1)])
def test_no_word_is_broken_on_a_narrow_terminal(width: int, tables: int) -> None:
    """Metrics that do not fit the width go into a further table."""
    titles = [
        "gradient score",
        "energy error",
        "shadow score",
        "deadzone",
        "saturation",
        "weight error",
        "SQNR (classic)",
    ]
    metrics = {title: {"title": title, "unit": "nats^2/token"} for title in [*titles, "relative error (classic)"]}
    rows = [{"layer": layer, **dict.fromkeys(metrics, 0.0123)} for layer in (0, 1)]
    agreement = dict.fromkeys(metrics, 0.5)
    scan = {"metrics": metrics, "rank_by": "deadzone", "ranking": [1, 0], "layers": rows, "agreement": agreement}
    console = Console(width=width, record=True, file=StringIO())
    console.print(scan_table(scan, "title"))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("halves") == tables
    words = text.split()
    for word in " ".join(titles).split():
        assert word in words
    assert words.count("nats^2/token") == len(metrics)


def test_linears_are_listed_by_what_the_hardware_touches() -> None:
    untouched = dict.fromkeys(("energy_error", "deadzone_ratio", "saturation_ratio", "weight_error"))
    assert linear_table({"linears": [{"name": "a", **untouched}]}, 8) is None
    table = linear_table({"linears": [{"name": "a", **untouched, "weight_error": 0.1}]}, 8)
    assert table is not None and [column.header for column in table.columns] == ["Linear", "weight error"]
