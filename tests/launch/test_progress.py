"""The live display: lines of events where the output is piped, and the table on a terminal."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from roundoff.launch.progress import Progress, seconds_left
from roundoff.launch.request import Job, RunRequest
from roundoff.runs.directory import RunDirectory
from tests.simulated import experiment, profile

LONG_AGO, LATER = "2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    request = RunRequest(experiment("a"), profile(), 0, tmp_path, {"command": "test"}, tracker="none")
    with RunDirectory(tmp_path, request.experiment, request.profile, 0) as run:
        run.start({"command": "test"}, 10)
    return Job(request, phase="running")


def write(job: Job, steps: range, *, time: str) -> None:
    rows = [{"step": s, "seconds": 2.0, "deployed": 0.5, "clean": 0.6, "time": time} for s in steps]
    (job.request.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def piped() -> tuple[Progress, io.StringIO]:
    output = io.StringIO()
    return Progress(Console(file=output, width=80), workers=1), output


@pytest.fixture(autouse=True)
def _every_update_is_drawn(monkeypatch) -> None:
    for name in ("REFRESH_S", "EVENTS_S"):
        monkeypatch.setattr(f"roundoff.launch.progress.{name}", 0.0)


def update(progress: Progress, *jobs: Job) -> None:
    progress.update(jobs)


def test_piped_output_is_one_plain_line_an_event(job: Job) -> None:
    progress, output = piped()
    with progress.shown():
        update(progress, job)
        write(job, range(2), time=LATER)
        update(progress, job)
        update(progress, job)
        job.phase = "complete"
        update(progress, job)
    assert output.getvalue().splitlines() == [
        "a seed 0: started",
        "a seed 0: step 0/10 deployed 50.0% clean 60.0% left 00:18",
        "a seed 0: step 1/10 deployed 50.0% clean 60.0% left 00:18",
        "a seed 0: complete",
    ]
    assert "\x1b" not in output.getvalue()


def test_a_resumed_run_does_not_say_again_what_it_had(job: Job) -> None:
    write(job, range(8), time=LONG_AGO)
    job.resumed = True
    progress, output = piped()
    with progress.shown():
        update(progress, job)
        write(job, range(6), time=LONG_AGO)  # back to the checkpoint of step 5
        update(progress, job)
        with (job.request.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 6, "seconds": 1.0, "deployed": 0.7, "clean": 0.7, "time": LATER}) + "\n")
        update(progress, job)
    assert [line.split(" left")[0] for line in output.getvalue().splitlines()] == [
        "a seed 0: resumed",
        "a seed 0: step 6/10 deployed 70.0% clean 70.0%",
    ]


@pytest.mark.parametrize(
    ("made", "since", "expected"),
    [(3, 0, "extended from step 2"), (3, 1, "extended from step 2"), (5, 0, "resumed"), (5, 1, "resumed")],
)
def test_an_extended_run_is_resumed_only_if_it_was_stopped(job: Job, made: int, since: int, expected: str) -> None:
    """`made` rows are from earlier: those of steps 0 to 2 were copied from the run that is extended."""
    (job.request.path / "provenance.json").write_text(json.dumps({"parent": {"step": 2}}))
    rows = [{"step": s, "seconds": 2.0, "time": LONG_AGO if s < made else LATER} for s in range(made + since)]
    (job.request.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.resumed = True
    progress, output = piped()
    with progress.shown():
        update(progress, job)
    assert output.getvalue() == f"a seed 0: {expected}\n"


def test_warnings_are_said_once_without_a_place_in_the_source(job: Job) -> None:
    progress, output = piped()
    job.warnings.append("passed over a damaged checkpoint")
    with progress.shown():
        update(progress, job)
        update(progress, job)
    assert output.getvalue().count("a seed 0: warning: passed over a damaged checkpoint\n") == 1


def test_a_terminal_shows_running_queued_and_finished_with_the_time_left(job: Job) -> None:
    write(job, range(4), time=LATER)
    output = io.StringIO()
    progress = Progress(Console(file=output, width=160, force_terminal=True), workers=1)
    waiting = Job(replace(job.request, seed=1))
    done = Job(replace(job.request, seed=2), phase="complete", message="was complete")
    with progress.shown():
        update(progress, job, waiting, done)
    shown = output.getvalue()
    for word in ("1 queued", "1 running", "1 complete", "3/10", "0:14"):
        assert word in shown
    assert seconds_left(job, [{"step": s, "seconds": 2.0} for s in range(1, 4)]) == 14.0


def test_what_was_not_computed_stands_beside_the_score(job: Job) -> None:
    progress, output = piped()
    rows = [{"step": 0, "seconds": 2.0, "deployed": 0.25, "clean": 0.5, "time": LATER, "deployed_nonfinite": 0.125}]
    rows += [{"step": 1, "seconds": 2.0, "nonfinite": 3, "time": LATER}]
    (job.request.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with progress.shown():
        update(progress, job)
        job.phase, job.message = "complete", "nothing was trained in 2 steps: no rollout could be computed"
        update(progress, job)
    assert output.getvalue().splitlines()[1:] == [
        "a seed 0: step 0/10 deployed 25.0% (12.5% not finite) clean 50.0% left 00:18",
        "a seed 0: complete (nothing was trained in 2 steps: no rollout could be computed)",
    ]


def test_the_table_marks_a_run_that_trained_nothing(job: Job) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=200)
    rows = [{"step": 1, "seconds": 2.0, "nonfinite": 3, "reward_errors": 0, "time": LATER}]
    (job.request.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.phase, job.message = "complete", "nothing was trained in 1 step: ..."
    progress = Progress(console, workers=1)
    with progress.shown():
        update(progress, job)
    assert "not trained" in output.getvalue()
    assert "3 rollouts not finite" in output.getvalue()
