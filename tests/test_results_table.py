"""The tables of docs/results-tiny.md, and that the documents name every experiment as it is declared."""

import re
import sys
from pathlib import Path

import pytest
from benchmarks import table

from roundoff.commands.list import MOST_LISTED
from roundoff.experiments import families, load_experiment
from tests.simulated import quickstart

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    quickstart(tmp_path / "runs")
    monkeypatch.setattr(table, "before_training", lambda run: {"kl": 0.0123, "hardware_kl": None})
    return tmp_path


def test_tables_hold_scores_and_verdicts(simulated):
    text = table.document([simulated / "runs"])
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "`plain`",
        "`mxfp4`",
        "`noise`",
        "`noise-aqn`",
        "`noise-aqn`",
    ]
    assert "costs accuracy" in rows[2]
    assert rows[4].split("|")[3].strip() == "0.0123"
    assert "Of 1 remedies: 1 x" in text
    assert str(simulated) not in text  # no path of this machine


def test_only_what_lies_between_the_markers_is_replaced(simulated, monkeypatch):
    page = simulated / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks/table.py", str(simulated / "runs"), "--out", str(page)])
    table.main()
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n\n12 runs of 4 experiments")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text


def test_without_a_complete_run_there_is_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no complete run"):
        table.document([tmp_path])


def test_the_document_names_every_experiment_as_it_is_declared():
    text = (DOCS / "experiments.md").read_text("utf-8")
    for family, names in families().items():
        if family == "quickstart" or len(names) > MOST_LISTED:
            continue
        for name in names:
            experiment = load_experiment(name)
            baseline = f"`{experiment.baseline}`" if experiment.baseline else ""
            assert f"| `{name}` | {experiment.title} | {baseline} |" in text


@pytest.mark.parametrize("family", [name for name, ids in families().items() if len(ids) > MOST_LISTED])
def test_the_document_explains_every_part_of_the_ids_of_a_large_family(family):
    section = (DOCS / "experiments.md").read_text("utf-8").split(f"### `{family}`\n")[1].split("\n## ")[0]
    section = section.split("\n### ")[0]
    ids = families()[family]
    assert f"{len(ids)} experiments: " in section
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    parts = [part for row in rows for part in re.findall("`([^`]+)`", row)]
    unexplained = [i for i in ids if not re.fullmatch(f"{family}(-({'|'.join(map(re.escape, parts))}))+", i)]
    assert not unexplained
    unused = [part for part in parts if not any(re.search(f"-{re.escape(part)}(-|$)", i) for i in ids)]
    assert not unused
