"""Many runs: isolated from each other, stopped and resumed, never made twice."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from roundoff.config import ConfigError, Task
from roundoff.experiments import load_experiment
from roundoff.launch import local
from roundoff.launch.local import run_grid
from roundoff.launch.request import RunRequest
from roundoff.runs.record import read_run
from tests.training.test_loop import with_training

LONG = 14
"""Steps of a long run."""


@pytest.fixture
def requests(tmp_path, small):
    return [
        RunRequest(load_experiment("quickstart-clean"), small, seed, tmp_path, {"command": "test"}, tracker="none")
        for seed in (0, 1)
    ]


@pytest.fixture
def long_requests(requests):
    """Runs that last for a second or two, so that they can be met at work."""
    experiment = requests[0].experiment.model_copy(update={"epochs": LONG // 2})
    profile = with_training(requests[0].profile, checkpoint_every=5, evaluate_every=1000)
    return [replace(request, experiment=experiment, profile=profile) for request in requests]


def is_at_work(request):
    metrics = request.path / "metrics.jsonl"
    return (request.path / "status.json").exists() and metrics.exists() and metrics.stat().st_size > 0


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_runs_are_made_once_and_then_known(requests):
    seen = []
    jobs = run_grid(requests, workers=2, watch=lambda jobs: seen.append([job.phase for job in jobs]))
    assert [(job.phase, job.message) for job in jobs] == [("complete", ""), ("complete", "")]
    assert seen[0] == ["running", "running"]
    assert all(read_run(r.path).is_final for r in requests)
    again = run_grid(requests, workers=2)
    assert [(job.phase, job.message) for job in again] == [("complete", "was complete")] * 2


def test_a_killed_run_takes_no_other_with_it_and_can_be_resumed(long_requests):
    killed = []

    def kill_first(jobs):
        if not killed and jobs[0].process is not None and is_at_work(jobs[0].request):
            os.kill(jobs[0].process.pid, signal.SIGKILL)
            killed.append(True)

    jobs = run_grid(long_requests, workers=2, watch=kill_first)
    assert killed
    assert jobs[0].phase == "failed"
    assert "its process died (exit code -9)" in jobs[0].message
    assert jobs[1].phase == "complete"
    assert read_run(long_requests[0].path).status.state == "interrupted"
    assert [job.phase for job in run_grid(long_requests, workers=2)] == ["complete", "complete"]


def make_in_forked_processes(requests):
    """`run_grid` with processes that begin as copies of this one: a server to fork them from takes seconds to start."""
    fork = multiprocessing.get_context("fork")
    local.multiprocessing.get_context = lambda method: fork
    run_grid(requests, workers=1)


def test_a_run_whose_parent_is_killed_saves_and_leaves(long_requests):
    (request, _) = long_requests
    parent = multiprocessing.get_context("forkserver").Process(target=make_in_forked_processes, args=([request],))
    parent.start()
    wait_until(lambda: is_at_work(request))
    parent.kill()
    parent.join()
    wait_until(lambda: read_run(request.path).status.state != "running")
    status = read_run(request.path).status
    assert (status.state, status.reason, status.step < LONG) == ("interrupted", "stopped on request", True)


@pytest.mark.slow
def test_runs_whose_parent_is_killed_save_and_leave_and_can_be_resumed(long_requests):
    parent = multiprocessing.get_context("spawn").Process(target=run_grid, args=(long_requests,), kwargs={"workers": 2})
    parent.start()
    wait_until(lambda: all(map(is_at_work, long_requests)))
    parent.kill()
    parent.join()
    wait_until(lambda: "running" not in [read_run(request.path).status.state for request in long_requests])
    status = [read_run(request.path).status for request in long_requests]
    assert [(s.state, s.reason, s.step < LONG) for s in status] == [("interrupted", "stopped on request", True)] * 2
    assert [job.phase for job in run_grid(long_requests, workers=2)] == ["complete", "complete"]


def test_an_interrupt_saves_every_run_and_the_next_call_goes_on(long_requests):
    def interrupt():
        wait_until(lambda: is_at_work(long_requests[0]))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    jobs = run_grid(long_requests, workers=1)
    thread.join()
    assert jobs[0].phase == "interrupted"
    assert (jobs[1].phase, jobs[1].message) == ("interrupted", "not begun")
    assert read_run(long_requests[0].path).status.state == "interrupted"
    assert [job.phase for job in run_grid(long_requests, workers=2)] == ["complete", "complete"]
    assert [row["step"] for row in read_run(long_requests[0].path).metrics] == list(range(LONG + 1))


def test_a_wrong_setting_fails_its_run_with_its_message(requests, tmp_path, small):
    bad = small.model_copy(update={"training": small.training.model_copy(update={"max_prompt_tokens": 2})})
    wrong = RunRequest(load_experiment("quickstart-clean"), bad, 0, tmp_path, {}, tracker="none")
    jobs = run_grid([wrong, requests[0]], workers=2)
    assert jobs[0].phase == "failed"
    assert jobs[0].message.startswith("profile.training.max_prompt_tokens is 2")
    assert jobs[1].phase == "complete"
    assert not (wrong.path / "status.json").exists()


def test_two_requests_for_one_directory_are_refused(requests):
    with pytest.raises(ConfigError, match="two runs would share"):
        run_grid([requests[0], requests[0]], workers=1)


def test_a_damaged_directory_is_left_alone(requests):
    requests[0].path.mkdir(parents=True)
    (requests[0].path / "status.json").write_text("{")
    jobs = run_grid(requests[:1], workers=1)
    assert jobs[0].phase == "failed"
    assert "damaged, move it away" in jobs[0].message
    assert (requests[0].path / "status.json").read_text() == "{"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "owner/name"}, "downloading is off"),
        ({"model": "/no/such/directory"}, "neither"),
        ({"task": Task(name="gsm8k", settings={"path": "/no/such/data"})}, "gsm8k"),
        ({"device": "npu"}, "device 'npu' is not there"),
    ],
)
def test_what_stops_every_run_is_said_once_before_the_first_begins(tmp_path, small, changes, message):
    profile = small.model_copy(update=changes)
    requests = [RunRequest(load_experiment("quickstart-clean"), profile, seed, tmp_path, {}, "none") for seed in (0, 1)]
    with pytest.raises(ConfigError, match=message) as refused:
        run_grid(requests, workers=2)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_stops_one_run_leaves_the_others_alone(tmp_path, small):
    missing = small.model_copy(update={"name": "missing", "model": "owner/name"})
    experiment = load_experiment("quickstart-clean")
    requests = [RunRequest(experiment, profile, 0, tmp_path, {}, "none") for profile in (missing, small)]
    failed, complete = run_grid(requests, workers=2)
    assert (failed.phase, complete.phase) == ("failed", "complete")
    assert "downloading is off" in failed.message
    assert not requests[0].path.exists()
