"""Copies of run directories are usable at every moment, and equal the original in the end."""

import filecmp
import os
from pathlib import Path

import pytest

from roundoff.experiments import load_experiment
from roundoff.launch.ray import sync as run_sync
from roundoff.launch.ray.sync import Outbox, put, snapshot
from roundoff.launch.request import RunRequest, execute
from roundoff.runs.directory import RunDirectory
from roundoff.runs.files import write_directory
from roundoff.runs.record import read_run


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


def test_a_status_is_never_younger_than_the_files_beside_it(request_, tmp_path, monkeypatch):
    """The run ends while it is read: a copy that says so must hold its last evaluation and checkpoint."""
    steps = iter(range(1, 10))
    execute(request_, lambda: next(steps) == 3)
    listed = run_sync.single_files

    def ends_meanwhile(path):
        found = listed(path)
        monkeypatch.setattr(run_sync, "single_files", listed)
        execute(request_, lambda: False)
        return found

    monkeypatch.setattr(run_sync, "single_files", ends_meanwhile)
    outbox, copy = Outbox(request_.path), tmp_path / "copy"
    put(outbox.changes(), copy)
    assert read_run(request_.path).status.state == "complete"
    assert read_run(copy).status.state == "interrupted"
    put(outbox.changes(), copy)
    assert read_run(copy).is_final
    assert names(copy) == names(request_.path)


def test_a_checkpoint_written_again_is_sent_again(request_, tmp_path):
    """A resume that passed over a damaged checkpoint writes it again; the copy must not keep the damaged one."""
    execute(request_, lambda: False)
    last, copy = request_.path / "checkpoints" / "step-000004", tmp_path / "copy"
    whole = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(b"damaged")
    outbox = Outbox(request_.path)
    put(outbox.changes(quiet=True), copy)

    def fill(directory):
        for file in last.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / "model.safetensors").write_bytes(whole)

    write_directory(last, fill)
    put(outbox.changes(), copy)
    assert (copy / "checkpoints" / "step-000004" / "model.safetensors").read_bytes() == whole


def test_a_checkpoint_that_is_being_removed_is_not_sent(request_, tmp_path):
    execute(request_, lambda: False)
    copy = tmp_path / "copy"
    (request_.path / "checkpoints" / "step-000003" / "state.json").unlink()
    put(Outbox(request_.path).changes(), copy)
    assert [d.name for d in (copy / "checkpoints").iterdir()] == ["step-000004"]


def test_a_snapshot_holds_damaged_checkpoints_too(request_, tmp_path):
    """Without them a run that has only damaged checkpoints would silently begin again elsewhere."""
    execute(request_, lambda: False)
    for state in (request_.path / "checkpoints").glob("*/state.json"):
        state.write_text("{")
    put(snapshot(request_.path), tmp_path / "copy")
    assert names(tmp_path / "copy") == names(request_.path)


def test_a_directory_that_vanishes_while_it_is_read_is_no_error(request_, monkeypatch):
    execute(request_, lambda: False)
    gone = request_.path / "gone"
    plain = os.scandir

    class Listed:
        """Entries of a directory, all read before it vanishes."""

        def __init__(self, entries):
            self._entries = iter(list(entries))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self._entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def vanishing(path="."):
        here = str(path) == str(request_.path)
        if here:
            gone.mkdir()
        with plain(path) as entries:
            found = Listed(entries)
        if here:
            gone.rmdir()
        return found

    monkeypatch.setattr(os, "scandir", vanishing)
    assert "metrics.jsonl" in Outbox(request_.path).changes().files
