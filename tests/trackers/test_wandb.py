"""Weights & Biases: what a stand-in for it receives, and the real package offline if it is installed."""

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from roundoff.config import ConfigError
from roundoff.trackers import WandbSettings, check_trackers, open_trackers
from tests.trackers.runs import log_steps, tracked

HERE = importlib.util.find_spec("wandb") is not None


class StandIn(SimpleNamespace):
    """The part of `wandb` that is used; `reachable` and `key` tell whether there are a network and credentials."""

    def __init__(self, *, reachable=True, key=True):
        super().__init__(reachable=reachable, key=key, begun=[], step=0)
        self.Settings = SimpleNamespace
        self.teardown = lambda: None

    def login(self, *, prompt, verify):
        assert not prompt and not verify
        return self.key

    def init(self, *, mode, resume=None, **arguments):
        if mode == "online" and not self.reachable:
            raise ConnectionError("no route to host")
        run = SimpleNamespace(mode=mode, resume=resume, step=self.step, logged=[], summary={}, code=None, **arguments)

        def log(values, step):
            run.logged.append(step)
            run.step = step + 1

        run.log, run.finish = log, lambda exit_code: setattr(run, "code", exit_code)
        self.begun.append(run)
        return run


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def track(path, *, first=0, last=3, ended="complete", **more):
    tracker = open_trackers("wandb", tracked(path, **more))
    log_steps(tracker, first, last)
    tracker.close(ended)


def test_a_run_is_offline_by_default_and_named_by_the_configuration(tmp_path, stand_in):
    track(tmp_path)
    (run,) = stand_in.begun
    assert (run.mode, run.project, run.name) == ("offline", "roundoff", "noisy seed 0")
    assert run.group.startswith("noisy/tiny-")
    assert run.tags == ["noise", "GRPO", "tiny"]
    assert run.config["experiment"]["hardware"]["matmul_noise"]["relative_std"] == 0.1
    assert (run.logged, run.code, run.summary["ended"]) == ([0, 1, 2, 3], 0, "complete")


def test_a_resumed_run_keeps_its_id_and_logs_no_step_twice(tmp_path, stand_in):
    online = WandbSettings("mine", online=True)
    track(tmp_path, ended="interrupted", wandb=online)
    stand_in.step = 4  # what the server has
    track(tmp_path, first=2, last=5, resumed_from=1, wandb=online)
    one, two = stand_in.begun
    assert one.id == two.id == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (two.mode, two.resume, two.project) == ("online", "allow", "mine")
    assert two.logged == [4, 5]


def test_another_run_has_another_id(tmp_path, stand_in):
    track(tmp_path / "a")
    track(tmp_path / "b")
    assert stand_in.begun[0].id != stand_in.begun[1].id


def test_a_run_stays_in_its_project_and_says_so(tmp_path, stand_in):
    track(tmp_path, ended="interrupted", wandb=WandbSettings("mine"))
    with pytest.warns(UserWarning, match="stays in the W&B project 'mine'"):
        track(tmp_path, wandb=WandbSettings("other"))
    assert [run.project for run in stand_in.begun] == ["mine", "mine"]


def test_a_failed_run_is_marked_as_failed(tmp_path, stand_in):
    track(tmp_path, ended="failed")
    assert stand_in.begun[0].code == 1


def test_without_a_network_the_run_is_kept_offline_and_says_so(tmp_path, stand_in):
    stand_in.reachable = False
    with pytest.warns(UserWarning, match="cannot be reached, so this run is kept offline: no route to host"):
        track(tmp_path, wandb=WandbSettings(online=True))
    assert [run.mode for run in stand_in.begun] == ["offline"]


def test_without_credentials_it_falls_back_to_offline_and_says_so(stand_in):
    assert check_trackers("wandb", WandbSettings(online=True)) == (WandbSettings(online=True), [])
    stand_in.key = False
    settings, (note,) = check_trackers("tensorboard,wandb", WandbSettings("mine", online=True))
    assert settings == WandbSettings("mine", online=False)
    assert "no credentials" in note and "offline" in note
    assert check_trackers("wandb", WandbSettings()) == (WandbSettings(), [])
    assert check_trackers("tensorboard", WandbSettings(online=True)) == (WandbSettings(online=True), [])


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'roundoff\[wandb\]'"):
        check_trackers("wandb", WandbSettings())


@pytest.mark.skipif(not HERE, reason="wandb is not installed: pip install 'roundoff[wandb]'")
def test_the_real_package_writes_both_sessions_of_a_run_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "run"
    track(path, ended="interrupted")
    track(path, first=2, last=5, resumed_from=1)
    identity = json.loads((path / "wandb.json").read_text())["id"]
    files = sorted((path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert files
    steps = [step for file in files for step in logged_steps(file)]
    assert steps[-1] == 5 and set(steps) == set(range(6))


@pytest.mark.skipif(not HERE, reason="wandb is not installed: pip install 'roundoff[wandb]'")
def test_the_real_package_has_no_credentials_in_an_empty_home(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, notes = check_trackers("wandb", WandbSettings(online=True))
    assert not settings.online and "no credentials" in notes[0]


def logged_steps(file: Path) -> list[int]:
    """Steps of the history records of a W&B file: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, steps, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a block's rest too short for a header is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            steps += [record.history.step.num] if record.WhichOneof("record_type") == "history" else []
    return steps
