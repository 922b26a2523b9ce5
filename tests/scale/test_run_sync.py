"""Copies of run directories: whole at every moment, and in the end the same."""

import filecmp
from pathlib import Path

import pytest

from roundoff.experiments import load_experiment
from roundoff.run_dir import RunDirectory, read_run
from roundoff.scale.local_grid import RunRequest, execute
from roundoff.scale.run_sync import Outbox, put, snapshot


@pytest.fixture
def request_(tmp_path, small):
    training = small.training.model_copy(update={"prompts_per_step": 4})
    short = small.model_copy(update={"training": training})  # four steps
    return RunRequest(load_experiment("quickstart-clean"), short, 0, tmp_path / "worker", {}, tracker="none")


def names(path: Path) -> set[str]:
    return {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != ".lock"}


def test_a_copy_kept_after_every_step_is_the_run_and_can_be_gone_on_from(request_, tmp_path):
    outbox, sent = Outbox(request_.path), []
    execute(request_, lambda: bool(sent.append(outbox.changes())))
    sent.append(outbox.changes())
    copy = tmp_path / "driver" / "seed-0"
    for number, update in enumerate(sent):
        put(update, copy)
        found = read_run(copy)
        steps = [int(d.name[5:]) for d in (copy / "checkpoints").iterdir()]
        assert max(steps) <= found.metrics[-1]["step"], number  # a checkpoint without its metrics would lose rows
    assert names(copy) == names(request_.path)
    assert filecmp.cmpfiles(copy, request_.path, names(copy), shallow=False)[1:] == ([], [])
    assert read_run(copy).is_final


def test_only_what_changed_is_sent(request_):
    execute(request_, lambda: False)
    outbox = Outbox(request_.path)
    first = outbox.changes()
    assert set(first.units) == {"checkpoints/step-000003", "checkpoints/step-000004"}
    assert list(first.files)[-1] == "status.json"
    assert not outbox.changes()


def test_a_run_goes_on_from_a_snapshot_to_the_same_bits(request_, tmp_path):
    steps = iter(range(1, 10))
    execute(request_, lambda: next(steps) == 2)
    elsewhere = RunRequest(
        request_.experiment, request_.profile, 0, tmp_path / "other", request_.provenance, tracker="none"
    )
    put(snapshot(request_.path), elsewhere.path)
    for request in (elsewhere, request_):
        execute(request, lambda: False)
    ends = [r.path / "checkpoints" / "step-000004" / "model.safetensors" for r in (elsewhere, request_)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert [row["step"] for row in read_run(elsewhere.path).metrics] == [0, 1, 2, 3, 4]


def test_a_lock_is_never_copied(request_):
    with RunDirectory(request_.root, request_.experiment, request_.profile, 0):
        (request_.path / ".metrics.jsonl.partial").write_text("half")
        assert not snapshot(request_.path)
