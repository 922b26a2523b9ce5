"""The script for a machine with a GPU: its rows, its processes, and all of it rehearsed on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from benchmarks import __main__ as listing
from benchmarks import gpu
from benchmarks.device import runs
from benchmarks.device.machine import Device
from benchmarks.device.results import DeviceLostError, Row

from tests.pretend_cuda import CPU, Rows


@pytest.fixture
def rows():
    return Rows()


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_speeds_are_judged_against_their_goals_and_not_in_a_rehearsal(rows):
    results = rows.results()
    results.at_least("share", 0.85, 0.85, "")
    results.at_least("low share", 0.68, 0.85, "")
    results.at_most("ratio", 1.25, 1.25, "")
    results.at_most("high ratio", 1.5, 1.25, "")
    results.at_most("synchronisations", 3, 0, "")
    rows.results(is_judged=False).at_least("rehearsed", 0.1, 0.85, "")
    assert [row.verdict for row in rows] == [
        "reached",
        "MISSED by 20 %",
        "reached",
        "MISSED by 20 %",
        "MISSED",
        "not judged",
    ]
    assert rows[1].goal == ">= 0.85" and rows[3].goal == "<= 1.25"
    assert rows[1].details == {"value": 0.68}


def test_an_error_is_a_row_and_the_next_measurement_follows(rows):
    results = rows.results()
    with results.attempt("first", CPU):
        raise ValueError("bad\nmore")
    with results.attempt("second", CPU):
        results.equal("second", "1 element", 0, "")
    assert [(row.what, row.measured, row.verdict) for row in rows] == [
        ("first", "ValueError: bad", "FAILED"),
        ("second", "1 element: 0 unequal", "equal"),
    ]


def test_a_device_that_is_lost_ends_the_part(rows, monkeypatch):
    monkeypatch.setattr(Device, "is_alive", lambda self: False)
    with (
        pytest.raises(DeviceLostError, match="after first: RuntimeError: illegal"),
        rows.results().attempt("first", CPU),
    ):
        raise RuntimeError("illegal memory access")
    assert rows.verdicts() == {"FAILED"}


# --- parts d and e ----------------------------------------------------------------------------------------------------


def test_what_runs_left_is_compared_without_times(tmp_path):
    for name, score in (("a", 1), ("b", 1), ("c", 2)):
        run = tmp_path / name / "run" / "seed-0"
        (run / "evaluations").mkdir(parents=True)
        (run / "evaluations" / "step-000001.jsonl").write_text(str(score))
        lines = [{"step": step, "deployed": score, "seconds_rollout": time.time()} for step in (0, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b, c = (runs.left_by(tmp_path / name) for name in "abc")
    assert len(a) == 3 and runs.differing(a, b) == []
    names = ["evaluations/step-000001.jsonl", "metrics of step 000", "metrics of step 001"]
    assert runs.differing(a, c) == names
    assert runs.differing(a, {}) == names


# --- the whole --------------------------------------------------------------------------------------------------------


def hang(device, results, *, small):
    results.shown("before", "hanging")
    time.sleep(600)


def raising(device, results, *, small):
    raise ValueError("broken part")


def killed(device, results, *, small):
    os.kill(os.getpid(), signal.SIGKILL)


def fine(device, results, *, small):
    results.shown("fine", f"{device.name} {small}")


@pytest.mark.slow
def test_a_part_that_hangs_dies_or_raises_does_not_stop_the_others(tmp_path, capsys):
    options = gpu.parser().parse_args(["--device", "cpu", "--small"])
    parts = [gpu.Part("x", f.__name__, f"tests.test_gpu_benchmark:{f.__name__}") for f in (hang, raising, killed, fine)]
    table = gpu.Table(tmp_path / "out.json", {"parts": {}})
    with (tmp_path / "out.log").open("w") as log:
        ended = gpu.run_stage(parts, options, 30.0, table, log)
    assert {name: how["ended"].partition(" after")[0] for name, how in ended.items()} == {
        "hang": "ended",
        "raising": "exit code 1",
        "killed": "exit code -9",
        "fine": "complete",
    }
    shown = {(row["what"], row["measured"].partition(";")[0]) for row in json.loads(table.out.read_text())["rows"]}
    assert ("before", "hanging") in shown and ("fine", "cpu True") in shown
    assert ("tests.test_gpu_benchmark:raising", "ValueError: broken part") in shown
    assert "raise ValueError" in (tmp_path / "out.log").read_text()
    assert "FAILED: x, killed: exit code -9" in "\n".join(table.summary())


def test_options_are_checked(capsys):
    for wrong in (["--parts", "a,z"], ["--minutes", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit):
            gpu.parser().parse_args(wrong)
    assert "there is no part 'z' (known: a, b, c, d, e)" in capsys.readouterr().err
    assert gpu.parser().parse_args(["--parts", "a, c"]).parts == ("a", "c")


def test_options_after_the_last_name_belong_to_it(monkeypatch, capsys):
    got = []
    monkeypatch.setattr(gpu, "main", lambda options: got.append(options) or 3)
    assert listing.run(["gpu", "--parts", "c", "--small"]) == 3
    assert (got[0].parts, got[0].small, got[0].device) == (("c",), True, "cuda")
    assert listing.run(["noise", "--small"]) == listing.run(["--small"]) == 2
    assert "noise takes no options, but got ['--small']" in capsys.readouterr().err
    assert listing.run(["nothing", "--small"]) == 2
    assert "gpu" in listing.ALONE and "gpu" in listing.available()
    assert "there is no benchmark 'nothing'" in capsys.readouterr().err


def test_the_page_sums_up_what_found_nothing(tmp_path, capsys):
    table = gpu.Table(tmp_path / "out.json", {"source": {"commit": "abc"}, "parts": {}})
    table.add(Row("machine", "machine", "cuda", "", "", {"card": "Pretended 100"}))
    table.add(Row("c", "copy", "3,000 GB/s", "", ""))
    for what, verdict in (("mxfp4", "equal"), ("int4", "equal"), ("nvfp4", "DIFFERS")):
        table.add(Row("a", what, "x|y", "0 unequal", verdict))
    assert list(table.page()) == [
        "card Pretended 100; commit abc",
        f"\n{gpu.HEAD}",
        "| a | 2 comparisons | as they should be | | |",
        "| a | nvfp4 | x\\|y | 0 unequal | DIFFERS |",
        "| c | copy | 3,000 GB/s |  |  |",
    ]
    assert list(table.summary()) == ["4 rows: 1 shown, 2 equal, 1 DIFFERS", "DIFFERS: a, nvfp4: x|y"]
    assert [row["part"] for row in json.loads(table.out.read_text())["rows"]] == ["a", "a", "a", "c"]
    assert "card: Pretended 100\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert {row["part"] for row in content["rows"]} == {"a", "b", "c", "d", "e"}
    assert {part["ended"] for part in content["parts"].values()} == {"complete"}
    verdicts = {row["verdict"] for row in content["rows"]}
    assert verdicts == {"equal", "reached", "", "not judged", "left out"}
    assert all("synchronisations" in row["what"] for row in content["rows"] if row["verdict"] == "left out")
    assert content["machine"]["device"] == "cpu"
    assert any("killed at step" in row["what"] for row in content["rows"])
    assert "comparisons | as they should be" in out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_device_that_is_not_there_is_said(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "xpu", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "device 'xpu' is not there (found: cpu)" in done.stdout
    assert "nothing can be measured on 'xpu'" in done.stderr


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        ("print('no space')", 60, "it ended before it could be killed halfway; it said: no space"),
        ("import time; time.sleep(60)", 0.1, "it was not halfway within 0 s, so give more --minutes"),
    ],
)
def test_what_cannot_be_killed_halfway_says_why(tmp_path, monkeypatch, code, seconds, said):
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: begin([sys.executable, "-c", code], **how))
    with runs.Command(tmp_path / "run", ("any",), "cpu", {}) as command, pytest.raises(RuntimeError, match=said):
        runs.kill_halfway(command, 8, seconds)
