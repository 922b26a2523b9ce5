"""Runs that are killed, stopped, or meet a damaged or full disk end with the bits of an undisturbed run."""

import errno
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from roundoff.config import LoRA, result_hash
from roundoff.experiments import load_experiment
from roundoff.launch import local as local_grid
from roundoff.launch.request import RunRequest
from roundoff.models.load import TINY_DIRECTORY
from roundoff.runs.checkpoint import DamagedCheckpointError
from roundoff.runs.directory import RunDirectory, run_path
from roundoff.runs.files import DiskFullError
from roundoff.runs.record import read_run
from roundoff.trackers import NullTracker
from roundoff.training.loop import train
from tests.training.test_loop import reproducible, run, with_training

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["roundoff.training.loop"])
KILLS = 20


def left(path: Path) -> dict:
    """Everything that a run left except times: all that must not depend on what happened to it."""
    files = [*(path / "evaluations").iterdir(), *(path / "checkpoints").glob("*/*"), *path.glob("adapter/*")]
    return {"metrics": reproducible(path)} | {str(f.relative_to(path)): f.read_bytes() for f in files}


def attempt(root, experiment, profile, die_at=None):
    """Body of a child process; with `die_at` it is killed just before that operation on the file system."""
    if die_at is not None:
        kill_before_operation(die_at)
    with RunDirectory(root, experiment, profile, 0) as run_dir:
        train(experiment, profile, 0, run_dir, lambda start: NullTracker(), provenance={})


def kill_before_operation(number: int) -> None:
    """Patches what makes a change last: sync, rename, removal, and the first write to a file."""
    count = iter(range(number))

    def dying(function):
        def called(*arguments, **options):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    os.fsync = dying(os.fsync)
    shutil.rmtree = dying(shutil.rmtree)
    Path.replace, Path.unlink, Path.mkdir = dying(Path.replace), dying(Path.unlink), dying(Path.mkdir)
    RunDirectory.append_metrics = dying(RunDirectory.append_metrics)


def child(*arguments, wait: float | None = None) -> int:
    """Exit code of an attempt, killed after `wait` seconds."""
    process = CONTEXT.Process(target=attempt, args=arguments)
    process.start()
    process.join(wait)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path, small, lora):
    experiment = load_experiment("quickstart-noise-aqn").model_copy(update={"epochs": 5})
    if lora:
        experiment = experiment.model_copy(update={"lora": LoRA(rank=4, dropout=0.1)})
    profile = with_training(small, evaluate_every=3, checkpoint_every=2)
    child(tmp_path / "warm", experiment, profile, 0)  # the first child waits until its server has imported torch
    began = time.monotonic()
    assert child(tmp_path / "whole", experiment, profile) == 0
    duration = time.monotonic() - began
    expected = left(run_path(tmp_path / "whole", experiment, profile, 0))
    moments = random.Random(0)
    kills, steps, number = 0, set(), 0
    while kills < KILLS:  # a run that survived long enough to end is compared, and the next one begins
        root, number = tmp_path / str(number), number + 1
        path = run_path(root, experiment, profile, 0)
        while (code := child(root, experiment, profile, wait=moments.uniform(0.05, 0.8) * duration)) != 0:
            assert code == -signal.SIGKILL
            kills += 1
            assert kills < 50 * KILLS, "no progress"
            steps.add(len(reproducible(path)) if (path / "metrics.jsonl").exists() else -1)
        assert read_run(path).is_final
        assert left(path) == expected
    print(f"{kills} kills in {number} runs, after {sorted(steps)} lines of metrics")
    assert len(steps) > 3, steps  # they fell on different steps


@pytest.mark.slow
def test_a_kill_before_any_operation_on_the_file_system_changes_no_bit(tmp_path, small):
    experiment = load_experiment("quickstart-noise").model_copy(update={"lora": LoRA(rank=4)})
    profile = with_training(small, evaluate_every=1)
    assert child(tmp_path / "whole", experiment, profile) == 0
    expected = left(run_path(tmp_path / "whole", experiment, profile, 0))
    path = run_path(tmp_path / "killed", experiment, profile, 0)
    kills = 0
    while (code := child(tmp_path / "killed", experiment, profile, kills)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= KILLS
    assert read_run(path).is_final
    assert left(path) == expected


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the uninterrupted run of an experiment left; each is made once."""
    known = {}

    def made(experiment, profile):
        name = result_hash(experiment, profile)
        if name not in known:
            known[name] = left(run(tmp_path_factory.mktemp(name), experiment, profile).path)
        return known[name]

    return made


@pytest.mark.parametrize(
    ("victim", "how"),
    [("model.safetensors", "cut"), ("optimizer.safetensors", "flip"), ("state.json", "cut"), ("state.json", "flip")],
)
def test_a_damaged_checkpoint_is_passed_over_and_reported(tmp_path, small, whole, victim, how):
    experiment = load_experiment("quickstart-noise")
    path = run(tmp_path / "parts", experiment, small, stop_after=1).path
    damage(path / "checkpoints" / "step-000001" / victim, how)
    with pytest.warns(UserWarning, match="passed over a damaged checkpoint: .*step-000001.*went on from step 0"):
        resumed = run(tmp_path / "parts", experiment, small)
    assert left(path) == whole(experiment, small)
    (line,) = resumed.status.warnings
    assert "step-000001" in line
    assert read_run(path).status.warnings == (line,)


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path, small):
    experiment = load_experiment("quickstart-clean").model_copy(update={"epochs": 3})
    profile = with_training(small, checkpoint_every=2)
    path = run(tmp_path, experiment, profile, stop_after=3).path  # a stop saves: checkpoints 2 and 3
    damage(path / "checkpoints" / "step-000003" / "model.safetensors", "flip")
    with pytest.warns(UserWarning, match="went on from step 2"):
        run(tmp_path, experiment, profile, stop_after=2)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_no_usable_checkpoint_is_an_error_that_leaves_the_run_as_it_is(tmp_path, small):
    experiment = load_experiment("quickstart-clean").model_copy(update={"epochs": 2})
    path = run(tmp_path, experiment, small, stop_after=2).path
    for checkpoint in (path / "checkpoints").iterdir():
        damage(checkpoint / "model.safetensors", "flip")
    before = left(path) | {"status": (path / "status.json").read_bytes()}
    with pytest.raises(DamagedCheckpointError, match=r"(?s)move the run's directory away.*step-000002.*step-000001"):
        run(tmp_path, experiment, small)
    assert left(path) | {"status": (path / "status.json").read_bytes()} == before


def fail_from(monkeypatch, target: str, good_calls: int, error: Exception) -> None:
    module, _, name = target.rpartition(".")
    real = getattr(importlib.import_module(module), name)
    calls = iter(range(good_calls))

    def failing(*arguments, **options):
        if next(calls, None) is None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(target, failing)


@pytest.mark.parametrize(
    ("target", "good_calls", "error"),
    [
        (
            "safetensors.torch.save_file",
            3,  # of step 0: weights and (empty) optimizer; of step 1: weights
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
        ("os.fsync", 25, OSError(errno.ENOSPC, "No space left on device")),
        ("roundoff.runs.directory.write_atomic", 3, OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_full_disk_is_a_clear_message_and_a_run_that_goes_on(
    tmp_path, small, whole, monkeypatch, target, good_calls, error
):
    experiment = load_experiment("quickstart-noise")
    with monkeypatch.context() as patch:
        fail_from(patch, target, good_calls, error)
        with pytest.raises(DiskFullError, match=r"no space is left for .*seed-0: free some, and the same command"):
            run(tmp_path / "full", experiment, small)
    path = run_path(tmp_path / "full", experiment, small, 0)
    assert not list(path.rglob("*.partial*"))
    if (path / "status.json").exists():
        assert read_run(path).status.state == "interrupted"
    run(tmp_path / "full", experiment, small)
    assert left(path) == whole(experiment, small)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the first checkpoint and half of the second."""
    size = 1.5 * (TINY_DIRECTORY / "model.safetensors").stat().st_size
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(small, small_disk, whole):
    experiment = load_experiment("quickstart-noise")
    with pytest.raises(DiskFullError, match="no space is left"):
        run(small_disk, experiment, small)
    path = run_path(small_disk, experiment, small, 0)
    status = read_run(path).status
    assert (status.state, status.step) == ("interrupted", 1)
    assert "No space left on device" in status.reason
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(small_disk, experiment, small)
    assert left(path) == whole(experiment, small)


def test_sigterm_finishes_the_step_and_saves_it(tmp_path, small):
    experiment = load_experiment("quickstart-noise").model_copy(update={"epochs": 20})
    profile = with_training(small, checkpoint_every=1000, evaluate_every=1000)
    request = RunRequest(experiment, profile, 0, tmp_path, {}, tracker="none")
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=local_grid.make_run_in_process, args=(request, theirs))
    process.start()
    deadline = time.monotonic() + 60
    metrics = request.path / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert json.loads(ours.recv_bytes())[0] == "interrupted"
    stopped = read_run(request.path)
    assert (stopped.status.state, stopped.status.reason) == ("interrupted", "stopped on request")
    assert 2 <= stopped.status.step < 40
    assert stopped.metrics[-1]["step"] == stopped.status.step
    state = json.loads((request.path / "checkpoints" / f"step-{stopped.status.step:06d}" / "state.json").read_text())
    assert state["step"] == stopped.status.step


def test_a_run_killed_after_its_last_checkpoint_has_its_score(tmp_path, small, monkeypatch):
    experiment = load_experiment("quickstart-noise").model_copy(update={"lora": LoRA(rank=4)})

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_adapter", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, experiment, small)
    with RunDirectory(tmp_path, experiment, small, 0) as run_dir:
        final = train(experiment, small, 0, run_dir, lambda start: NullTracker(), provenance={})
        assert final == run_dir.evaluation(2)
        assert read_run(run_dir.path).is_final
        assert (run_dir.path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_last_score_that_is_lost_is_made_again(tmp_path, small, damage):
    experiment = load_experiment("quickstart-noise")
    whole = run(tmp_path, experiment, small)
    file = whole.path / "evaluations" / "step-000002.jsonl"
    before = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(before[:-20])
    assert run(tmp_path, experiment, small).is_final
    assert file.read_bytes() == before
