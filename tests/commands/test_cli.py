"""The command line as a user meets it: how fast it starts, messages, exit codes, and whole sessions."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from roundoff.cli import main
from roundoff.commands.list import MOST_LISTED
from roundoff.commands.options import parse_seeds
from roundoff.config import ConfigError
from roundoff.experiments import experiment_ids, families, load_experiment
from roundoff.formats.table import FORMATS
from tests.program import roundoff
from tests.training.test_loop import run as make_run

SMALL = [
    "--set=profile.training.prompts_per_step=8",
    "--set=profile.task.settings={train_problems = 16, test_problems = 16}",
]


def in_its_own_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Of commands that import no torch; others take seconds for that, and are called by `roundoff` in this process."""
    command = [sys.executable, "-m", "roundoff", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_list_of_formats_names_every_one(tmp_path):
    rows = in_its_own_process("list", "--formats", cwd=tmp_path).stdout.splitlines()
    assert [row.split()[0] for row in rows[1 : 1 + len(FORMATS)]] == list(FORMATS)
    assert next(row for row in rows if row.startswith("nvfp4:2d")).split()[1:5] == [
        "E2M1",
        "4.03",
        "16x16",
        "E4M3+tensor",
    ]
    assert max(map(len, rows)) <= 80


def listed_ids(*arguments, cwd):
    lines = in_its_own_process("list", *arguments, cwd=cwd).stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith("  ")]


def test_list_names_every_experiment_of_families_that_are_not_large(tmp_path):
    large = {family: ids for family, ids in families().items() if len(ids) > MOST_LISTED}
    assert list(large) == ["mismatch", "remedies"]
    listed = set(listed_ids(cwd=tmp_path)) & set(experiment_ids())
    assert listed == set(experiment_ids()) - {name for ids in large.values() for name in ids}
    lines = in_its_own_process("list", cwd=tmp_path).stdout.splitlines()
    for family, ids in large.items():
        said = f"  {len(ids)} experiments; `roundoff list --family {family}` shows them"
        assert lines[lines.index(family) + 1] == said


def test_list_of_families_names_each_of_their_experiments_and_nothing_else(tmp_path):
    chosen = ("--family", "remedies", "--family", "ratio", "--family", "ratio")
    assert listed_ids(*chosen, cwd=tmp_path) == [*families()["remedies"], *families()["ratio"]]
    refused = in_its_own_process("list", "--family", "remedis", cwd=tmp_path)
    assert refused.returncode == 2
    assert "there is no family 'remedis'; did you mean 'remedies'" in refused.stderr
    assert "leave one out" in in_its_own_process("list", "--formats", "--family", "ratio", cwd=tmp_path).stderr


def test_list_imports_no_torch():
    code = (
        "import sys; from roundoff.cli import cli; cli(['list'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runn"], "there is no command 'runn'; did you mean 'run'?"),
        (["run", "quickstar"], "there is no experiment 'quickstar'; did you mean 'quickstart'?"),
        (["run", "quickstart", "--seeds", "x"], "--seeds must read 3, 0-2 or 0,4,7, but is 'x'"),
        (["run", "quickstart", "--profile", "tinny"], "there is no profile 'tinny'; did you mean 'tiny'?"),
        (["run", "quickstart", "--tracker", "wandbb"], "--tracker must be one of"),
        (["run", "quickstart", "--set", "hardware.matmul_noise.relative_std=1.5"], "must be in [0, 1) (5 % is 0.05)"),
        (["run", "quickstart", "--set", "hardware.precision.weight=mxfp5"], "did you mean 'mxfp4'?"),
        (["show", "quickstart-nois"], "did you mean 'quickstart-noise'?"),
        (["run", "quickstart", "--seeds", "²"], "--seeds must read 3, 0-2 or 0,4,7, but is '²'"),
        (["eval", "tiny", "--temperature", "0.5"], "--temperature is that of sampled responses"),
        (["scan", "tiny", "--faults", "--noise", "0.1", "--exact"], "leave out --noise, --exact"),
        (["scan", "tiny", "--direction", "robust"], "--direction does nothing without --multipliers"),
        (["scan", "tiny", "--multipliers", "target"], "--multipliers must be one of targeted, variable, "),
        (["scan", "tiny", "--multipliers", "targeted", "--direction", "up"], "--direction must be one of sensitive, "),
        (["export", "nowhere", "out"], "nowhere is no run (it holds no experiment.toml)"),
        (["report"], "there are no runs in runs"),
        (["report", "--out", f"{__file__}/report"], "test_cli.py is a file and not a directory"),
        (["scan", "tiny", "--json", f"{__file__}/scan.json"], "test_cli.py is a file and not a directory"),
        (["eval", "tiny", "--out", f"{__file__}/scores.json"], "test_cli.py is a file and not a directory"),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(tmp_path, arguments, expected):
    done = roundoff(*arguments, cwd=tmp_path, check=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_says_so_by_its_exit_code_and_one_message(tmp_path):
    done = in_its_own_process("run", "quickstar", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("roundoff: there is no experiment 'quickstar'; did you mean 'quickstart'?")
    assert done.stderr.count("\n") == 1


def test_no_runs_are_said_to_be_none(tmp_path):
    assert "there are no runs in nowhere" in roundoff("runs", "--runs", "nowhere", cwd=tmp_path).stderr


def test_a_scan_is_written_into_a_new_directory(tmp_path):
    options = ["--tokens", "32", "--no-gradient", "--json", "new/scan.json", "--picture", "new/scan.svg"]
    roundoff("scan", "tiny", *options, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["scan.json", "scan.svg"]


def test_run_report_and_runs_from_end_to_end(tmp_path):
    names = ["quickstart-clean", "quickstart-mxfp4"]
    done = roundoff("run", *names, "--seeds", "0-1", *SMALL, cwd=tmp_path)
    changed = "prompts_per_step=8,train_problems=16,test_problems=16"
    assert f"quickstart-mxfp4 ({changed}) seed 0: step 2/2 deployed" in done.stdout
    again = roundoff("run", *names, "--seeds", "0-1", *SMALL, cwd=tmp_path)
    assert again.stdout.count("complete (was complete)") == 4
    table = roundoff("report", cwd=tmp_path).stdout
    assert "MXFP4 weights and activations" in table
    for name in ("summary.md", "results.csv", "results.json", "report.html"):
        assert (tmp_path / "report" / name).stat().st_size > 0
    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "report" / "results.csv").open())}
    assert set(rows) == set(families()["quickstart"])
    assert {name for name, row in rows.items() if "missing" in row["status"]} == set(rows) - set(names)
    listed = roundoff("runs", cwd=tmp_path).stdout.splitlines()
    assert len(listed) == 4
    assert all("complete  step 2/2  deployed" in line for line in listed)


def test_eval_export_and_extend_from_end_to_end(tmp_path, small, monkeypatch, capfd):
    path = str(make_run(tmp_path / "runs", load_experiment("quickstart-noise"), small).path)
    monkeypatch.chdir(tmp_path)

    def main_with(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["roundoff", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, "".join(capfd.readouterr())

    code, scored = main_with("eval", path, "--samples", "2", "--out", "scores.json")
    assert code == 0
    assert "equal to what the run recorded at step 2" in scored
    assert "sampled pass@2" in scored
    assert Path("scores.json").exists()
    assert main_with("eval", path, "--out", "scores.json") == (2, "roundoff: scores.json exists: name another file\n")
    assert main_with("export", path, "model") == (0, "wrote model: quickstart-noise seed 0 after step 2\n")
    code, scored = main_with("eval", "model", "--hardware", "quickstart-mxfp4", SMALL[1])
    assert "weight mxfp4, activation mxfp4" in scored
    code, extended = main_with("extend", path, "--epochs", "2", "--tracker", "none")
    assert (code, "step 4/4 deployed" in extended) == (0, True)
    assert "seed 0: extended from step 2\n" in extended
    code, refused = main_with("compare", path, "quickstart-noise")
    assert (code, "are the same runs, or share some" in refused) == (2, True)
    code, refused = main_with("extend", path, "--epochs", "1")
    assert (code, "--epochs must be above the 1" in refused) == (2, True)
    code, refused = main_with("eval", "nothing-here")
    assert (code, "model 'nothing-here' is neither" in refused) == (2, True)


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path):
    command = ["run", "quickstart-clean", "--seeds", "0", *SMALL, "--set=epochs=10"]

    def press_ctrl_c():
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    stopped = roundoff(*command, cwd=tmp_path, check=130)
    thread.join()
    assert "1 run stopped before its end; the same command resumes it." in stopped.stderr
    assert "interrupted" in roundoff("runs", cwd=tmp_path).stdout
    assert "resumed" in roundoff(*command, cwd=tmp_path).stdout
    assert "complete  step 20/20" in roundoff("runs", cwd=tmp_path).stdout


def test_show_prints_settings_layers_and_sigma(tmp_path):
    shown = roundoff("show", "quickstart-noise-aqn", cwd=tmp_path).stdout
    assert "relative_std = 0.1" in shown
    assert "42 modules" in shown
    assert "lm_head" in shown
    assert "0.05" in shown.split("# aqn")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "runs").write_text("a file where the directory should be")
    done = roundoff("run", "quickstart-clean", "--seeds", "0", *SMALL, cwd=tmp_path, check=1)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-2", [0, 1, 2]), ("0,4,7", [0, 4, 7]), ("1,3-4", [1, 3, 4])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "-1", "a", "2-", "1,1", "3-1", "0,3-1", "²"])
def test_wrong_seeds(text):
    with pytest.raises(ConfigError, match="--seeds must"):
        parse_seeds(text)


def test_cores_are_counted_where_the_system_does_not_say_which_may_be_used(monkeypatch):
    from roundoff.actions.run import available_cores

    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr("os.sched_getaffinity")  # macOS
    assert available_cores() == os.cpu_count()


def test_a_table_from_elsewhere_is_judged_by_its_intervals(tmp_path):
    # 80 % against 70 % on 1,000 problems each: 10 points with a standard error of 1.9, far beyond it; 71 % is not
    (tmp_path / "scores.csv").write_text("id,baseline,score\nplain,,70.0\nbetter,plain,80.0\nsame,plain,71.0\n")
    done = roundoff("import-table", "scores.csv", "--n", "1000", cwd=tmp_path).stdout
    lines = {line.split()[0]: line for line in done.splitlines() if line.strip()}
    assert "exceeds the error" in lines["better"]
    assert "within its error" in lines["same"]
