"""Run directories: nothing half-written, nothing overwritten, every state read back as what it is."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import load_experiment, load_profile
from roundoff.runs.directory import RunDirectory, RunLockedError, run_path
from roundoff.runs.outcomes import DamagedRunError, Evaluation, Outcome
from roundoff.runs.provenance import provenance
from roundoff.runs.record import Status, find_runs, read_metrics, read_run


@pytest.fixture
def run_dir(tmp_path):
    with RunDirectory(tmp_path, load_experiment("quickstart-noise-aqn"), load_profile("tiny"), 3) as directory:
        yield directory


def evaluation(step: int) -> Evaluation:
    return Evaluation(
        step,
        (
            Outcome("a", "1+1=", "2", (1, 0), 1, "2", "2"),
            Outcome("b", "2+2=", "4", (0, 0), 1, "5", "4", truncated=True),
        ),
    )


def test_path_names_experiment_profile_and_seed(run_dir, tmp_path):
    experiment, profile_and_hash, seed = run_dir.path.relative_to(tmp_path).parts
    assert (experiment, seed) == ("quickstart-noise-aqn", "seed-3")
    assert profile_and_hash.startswith("tiny-")
    assert len(profile_and_hash) == len("tiny-") + 8


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "é" * 200])
def test_a_name_that_cannot_name_a_directory_below_the_root_is_refused(tmp_path, small, name):
    experiment = load_experiment("quickstart-clean")
    with pytest.raises(ConfigError, match="the id of an experiment must be"):
        run_path(tmp_path, experiment.model_copy(update={"id": name}), small, 0)
    with pytest.raises(ConfigError, match="the name of a profile must be"):
        run_path(tmp_path, experiment, small.model_copy(update={"name": name}), 0)


def test_what_is_written_is_read_back(run_dir):
    status = run_dir.start({"command": "c"}, total_steps=2)
    for step in (0, 1, 2):
        run_dir.append_metrics({"step": step, "reward": step / 2})
    run_dir.write_evaluation(evaluation(0))
    run_dir.write_evaluation(evaluation(2))
    run_dir.set_status(replace(status, state="complete", step=2, seconds=1.5))
    run = read_run(run_dir.path)
    assert (run.experiment, run.profile, run.seed) == (run_dir.experiment, run_dir.profile, 3)
    assert (run.status.state, run.status.step, run.status.seconds) == ("complete", 2, 1.5)
    assert [row["reward"] for row in run.metrics] == [0.0, 0.5, 1.0]
    assert run.evaluated_steps == (0, 2)
    assert run.evaluation(2) == evaluation(2)
    assert run.is_final


def test_scores_average_draws_then_problems():
    assert evaluation(0).deployed == 0.25  # (1/2 + 0/2) / 2
    assert evaluation(0).clean == 1.0


def test_complete_without_the_last_evaluation_is_not_final(run_dir):
    status = run_dir.start({}, total_steps=2)
    run_dir.write_evaluation(evaluation(0))
    run_dir.set_status(replace(status, state="complete", step=2))
    assert not read_run(run_dir.path).is_final


def hold(path_parts, ready, release):
    with RunDirectory(*path_parts):
        ready.set()
        release.wait(30)


def test_second_process_is_refused(tmp_path):
    arguments = (tmp_path, load_experiment("quickstart-clean"), load_profile("tiny"), 0)
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(arguments, ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(RunLockedError, match="is held by another process"), RunDirectory(*arguments):
            pass
    finally:
        release.set()
        holder.join()
    with RunDirectory(*arguments):
        pass


def test_running_without_a_holder_is_interrupted(tmp_path):
    with RunDirectory(tmp_path, load_experiment("quickstart-clean"), load_profile("tiny"), 0) as directory:
        directory.start({}, total_steps=2)
    assert read_run(directory.path).status.state == "interrupted"


def test_a_run_of_another_user_is_running_while_it_is_held(run_dir, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    run_dir.start({}, 2)
    monkeypatch.setattr("roundoff.runs.record.FileLock", refused)
    assert read_run(run_dir.path).status.state == "running"
    run_dir.__exit__()
    assert read_run(run_dir.path).status.state == "interrupted"
    (run_dir.path / ".lock").unlink(missing_ok=True)
    assert read_run(run_dir.path).status.state == "interrupted"


def test_rewind_drops_later_steps_and_a_half_written_line(run_dir):
    run_dir.start({}, total_steps=4)
    for step in range(4):
        run_dir.append_metrics({"step": step})
    with (run_dir.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    for step in (0, 2, 3):
        run_dir.write_evaluation(evaluation(step))
    assert [row["step"] for row in read_metrics(run_dir.path)] == [0, 1, 2, 3]
    run_dir.rewind(2)
    assert (run_dir.path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    assert read_run(run_dir.path).evaluated_steps == (0, 2)


def test_a_full_disk_leaves_the_old_file(run_dir, monkeypatch):
    run_dir.set_status(Status("running", 1, 2))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_dir.set_status(Status("running", 2, 2))
    monkeypatch.undo()
    assert run_dir.status.step == 1
    assert not list(run_dir.path.glob("*.partial")) + list(run_dir.path.glob(".*.partial"))


def test_starting_again_keeps_settings_and_progress(run_dir):
    status = run_dir.start({"command": "first"}, total_steps=4)
    run_dir.set_status(replace(status, state="interrupted", step=2, seconds=7.0))
    again = run_dir.start({"command": "second"}, total_steps=4)
    assert (again.state, again.step, again.seconds) == ("running", 2, 7.0)
    assert read_run(run_dir.path).provenance == {"command": "first"}


@pytest.mark.parametrize("victim", ["experiment.toml", "provenance.json", "status.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_directories_are_listed_with_the_reason(run_dir, tmp_path, victim, damage):
    run_dir.start({"command": "c"}, total_steps=2)
    path = run_dir.path / victim
    text = path.read_text()
    path.unlink()
    if damage != "missing":
        path.write_text("" if damage == "empty" else text[: len(text) // 2])
    if (victim, damage) == ("experiment.toml", "cut"):
        path.write_text(text.replace("relative_std", "relativ_std"))
    runs, skipped = find_runs([tmp_path])
    assert runs == []
    assert len(skipped) == 1
    assert victim in skipped[0]


def test_a_directory_that_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(DamagedRunError) as refused:
        read_run(tmp_path)
    assert str(refused.value) == f"{tmp_path} is no run (it holds no experiment.toml)"


def test_what_is_no_run_is_passed_over(run_dir, tmp_path):
    run_dir.start({}, 2)
    (run_dir.path.with_name("seed-3.tar.gz")).write_text("an archive of it")
    experiment = load_experiment("quickstart-clean")
    with RunDirectory(tmp_path, experiment, load_profile("tiny"), 0):
        pass  # as `prepare` leaves it that refused the settings
    runs, skipped = find_runs([tmp_path])
    assert [found.path for found in runs] == [run_dir.path]
    assert skipped == []


def test_damaged_evaluation_names_the_file(run_dir):
    run_dir.start({}, total_steps=0)
    run_dir.write_evaluation(evaluation(0))
    file = run_dir.path / "evaluations" / "step-000000.jsonl"
    file.write_text(json.dumps({"id": "a"}) + "\n")
    with pytest.raises(DamagedRunError, match=r"step-000000\.jsonl cannot be read"):
        read_run(run_dir.path).evaluation(0)
    file.write_text("")
    with pytest.raises(DamagedRunError, match="holds no outcome"):
        read_run(run_dir.path).evaluation(0)


@pytest.mark.parametrize(
    ("victim", "content", "reason"),
    [
        ("metrics.jsonl", b"\xff\xfe\n", "cannot be read"),
        ("metrics.jsonl", b"5\n", "line 1 is not the row of a step"),
        ("metrics.jsonl", b'{"kl": 1}\n', "line 1 is not the row of a step"),
        ("metrics.jsonl", b'{"step": 1, "kl": "x"}\n', "kl must be a number"),
        ("provenance.json", b"[]", "holds no object"),
        ("status.json", b'{"state": "done", "step": 1, "total_steps": 2}', "state must be one of running, complete"),
        ("status.json", b'{"state": "complete", "step": 1, "total_steps": "2"}', "of another type"),
        ("status.json", b'{"state": "complete", "step": 1, "total_steps": 2, "updated": null}', "of another type"),
    ],
)
def test_files_of_the_wrong_content_are_named(run_dir, tmp_path, victim, content, reason):
    run_dir.start({"command": "c"}, total_steps=2)
    (run_dir.path / victim).write_bytes(content)
    runs, skipped = find_runs([tmp_path])
    assert (runs, len(skipped)) == ([], 1)
    assert victim in skipped[0] and reason in skipped[0]


@pytest.mark.parametrize("change", [{"deployed": []}, {"deployed": [float("nan")]}, {"clean": 0.5}, {"id": 7}])
def test_an_outcome_that_is_none_damages_its_evaluation(run_dir, change):
    run_dir.start({}, total_steps=0)
    run_dir.write_evaluation(evaluation(0))
    file = run_dir.path / "evaluations" / "step-000000.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    with pytest.raises(DamagedRunError, match=r"step-000000\.jsonl cannot be read"):
        read_run(run_dir.path).evaluation(0)


def test_roots_within_each_other_give_each_run_once(run_dir, tmp_path):
    run_dir.start({"command": "c"}, total_steps=2)
    runs, skipped = find_runs([tmp_path, run_dir.path.parent, run_dir.path])
    assert ([run.path for run in runs], skipped) == ([run_dir.path], [])


def test_the_command_can_be_given_again_however_it_was_started():
    """`python -m roundoff`, as under torchrun, is known to Python as a file __main__.py."""
    for program in ("/env/bin/roundoff", "/env/lib/python/site-packages/roundoff/__main__.py"):
        assert provenance([program, "run", "quickstart clean"])["command"] == "roundoff run 'quickstart clean'"
