"""Relative paths of a task begin at the TOML file that gives them, and those of --set where roundoff was started."""

import subprocess
import sys
from pathlib import Path

import pytest

from roundoff.config import ConfigError, Task, result_hash
from roundoff.experiments import load_experiment, load_profile, with_overrides
from roundoff.runs.directory import RunDirectory
from roundoff.runs.record import find_runs, read_run
from roundoff.tasks import make_task
from tests.tasks.problem_files import raw_files
from tests.tasks.test_own import SOURCE

OWN = 'extends = "tiny"\n[task]\nname = "mine.py:Mine"\n'
FILES = (
    'extends = "tiny"\n[task]\nname = "gsm8k"\nsettings = { train = "data/train.jsonl", test = "data/test.jsonl" }\n'
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of profiles with the files that they name; roundoff is started in another directory."""
    here = tmp_path / "profiles"
    (here / "data").mkdir(parents=True)
    (here / "mine.py").write_text(SOURCE)
    raw_files(here / "data")
    (here / "own.toml").write_text(OWN)
    (here / "files.toml").write_text(FILES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return here


def number(profile):
    return result_hash(load_experiment("quickstart-clean"), profile)


@pytest.mark.parametrize("name", ["own", "files"])
def test_a_path_begins_at_its_file(place, name, monkeypatch):
    absolute = load_profile(str(place / f"{name}.toml"))
    relative = load_profile(f"../profiles/{name}.toml")
    assert make_task(absolute).train() == make_task(relative).train()
    assert absolute == relative
    monkeypatch.chdir("/")
    assert make_task(relative).train()


def test_the_hash_does_not_depend_on_the_directory(place, tmp_path):
    (tmp_path / "copy").mkdir()
    for file in ("own", "files"):
        copy = tmp_path / "copy" / f"{file}.toml"
        copy.write_text((place / f"{file}.toml").read_text())
        assert number(load_profile(str(copy))) == number(load_profile(str(place / f"{file}.toml")))
    plain = load_profile("tiny")
    assert "directory" not in plain.task.model_dump()
    own = load_profile(str(place / "own.toml"))
    assert number(own) == number(own.model_copy(update={"task": Task(name="mine.py:Mine")}))  # as it was before


def test_a_path_of_set_begins_at_the_working_directory(place):
    raw_files(Path.cwd())
    for profile in ("tiny", str(place / "own.toml")):
        given = ["profile.task.name=gsm8k", "profile.task.settings.path=."]
        changed = with_overrides([], load_profile(profile), given)[1]
        assert len(make_task(changed).train()) == 5
        assert changed.task.settings == {"path": "."}
    one = with_overrides([], load_profile(str(place / "files.toml")), ["profile.task.settings.test=test.jsonl"])[1]
    assert one.task.settings == {"train": "data/train.jsonl", "test": "../elsewhere/test.jsonl"}
    assert len(make_task(one).test()) == 3
    Path("mine.py").write_text(SOURCE.replace("mine/c", "mine/d"))
    other = with_overrides([], load_profile(str(place / "own.toml")), ["profile.task.name=mine.py:Mine"])[1]
    assert make_task(other).test()[0].id == "mine/d"


def test_a_file_that_extends_another_keeps_its_paths(place, tmp_path):
    below = tmp_path / "below"
    below.mkdir()
    raw_files(below)
    (below / "child.toml").write_text(
        'extends = "../profiles/files.toml"\n[task.settings]\ntest = "test.jsonl"\ntest_problems = 2\n'
    )
    (below / "plain.toml").write_text('extends = "../profiles/own.toml"\ntitle = "x"\n')
    assert len(make_task(load_profile(str(below / "child.toml"))).test()) == 2
    assert make_task(load_profile(str(below / "plain.toml"))).test()[0].id == "mine/c"


def test_a_path_that_leads_nowhere_says_where_it_began(place):
    (place / "lost.toml").write_text(OWN.replace("mine.py", "profiles/mine.py"))
    with pytest.raises(ConfigError, match=r"there is no file .*/profiles/profiles/mine\.py .*begins at the TOML file"):
        make_task(load_profile(str(place / "lost.toml")))


def test_a_run_records_the_directory_of_its_task(place, tmp_path, monkeypatch):
    profile = load_profile("../profiles/own.toml")
    with RunDirectory(tmp_path / "runs", load_experiment("quickstart-clean"), profile, 0) as directory:
        directory.start({}, 1)
    monkeypatch.chdir("/")
    run = read_run(directory.path)
    assert run.profile == profile
    assert make_task(run.profile).test()[0].id == "mine/c"


@pytest.mark.slow
def test_a_run_and_its_score_find_the_task_from_any_directory(place, tmp_path, monkeypatch):
    from roundoff.actions.evaluate import score_subject
    from roundoff.actions.evaluation_subject import open_subject

    (place / "own.toml").write_text(
        OWN + "[training]\nprompts_per_step = 2\nevaluate_every = 1\ncheckpoint_every = 1\nmax_new_tokens = 4\n"
    )
    command = [sys.executable, "-m", "roundoff", "run", "quickstart-clean", "--seeds", "0", "--workers", "1"]
    command += ["--runs", str(tmp_path / "runs"), "--profile", "../profiles/own.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    (run,), skipped = find_runs([tmp_path / "runs"])
    assert (skipped, run.status.state) == ([], "complete")
    monkeypatch.chdir("/")
    result = score_subject(open_subject(str(run.path)))
    assert result.agrees is True
    assert run.profile.task.directory == str(place)
