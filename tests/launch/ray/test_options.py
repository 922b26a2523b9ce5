"""What is refused before anything is sent to a cluster; none of this starts Ray."""

import platform
import socket
import sys
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from filelock import FileLock

from roundoff.cli import cli
from roundoff.config import ConfigError
from roundoff.launch.ray import cluster as ray_cluster
from roundoff.launch.ray import worker as ray_worker
from roundoff.launch.ray.cluster import check_address, missing_resource
from roundoff.launch.ray.grid import SentJob
from roundoff.launch.ray.sync import Outbox
from roundoff.launch.ray.worker import Desk, Parcel, Post, check_shared, check_versions, driver_versions


@pytest.mark.parametrize("address", ["quickstart-clean", "ray://head:10001", "head:", ":6379", "http://head:6379"])
def test_an_address_that_cannot_be_one_is_refused(address):
    with pytest.raises(ConfigError, match=r"--ray must be local, auto or HOST:PORT"):
        check_address(address)


def test_an_address_that_does_not_answer_is_refused_within_seconds():
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"does not answer within 3 s \(deadline_exceeded\)"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 5
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1 does not answer"):
        check_address("127.0.0.1:1")


def test_options_of_ray_without_ray_are_refused(tmp_path):
    result = CliRunner().invoke(
        cli, ["run", "quickstart", "--runs", str(tmp_path), "--gpus-per-run", "1", "--ray-sync"]
    )
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "--gpus-per-run, --ray-sync do nothing without --ray"


def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"does not see .* use --ray-sync"):
        check_shared(tmp_path / "nothing")
    probe = tmp_path / ".probe"
    with FileLock(probe):
        check_shared(probe)
    probe.touch()
    with pytest.raises(RuntimeError, match=r"can take a lock .* two processes could write one run"):
        check_shared(probe)


def test_a_node_with_other_versions_is_refused():
    check_versions(driver_versions())
    with pytest.raises(RuntimeError, match=rf"node {platform.node()} has torch .*, the driver 1\.0"):
        check_versions({**driver_versions(), "torch": "1.0"})


def test_the_desk_tells_an_attempt_that_was_given_up_to_stop():
    desk, first = Desk(), Parcel(0, ["first"])
    assert not desk.beat(0, 1, "a", first)
    assert not desk.beat(0, 2, "b", None)
    assert desk.beat(0, 1, "a", Parcel(1, ["late"]))
    assert desk.collect() == ({0: (2, "b")}, [(0, 1, first)])
    assert desk.collect()[1] == []
    desk.stop()
    assert desk.beat(0, 2, "b", None)


def test_a_lost_parcel_cuts_an_attempt_off_and_one_that_came_twice_does_not():
    sent = SentJob(job=None, number=0)
    assert sent.is_next(Parcel(0, []))
    sent.parcels = 1
    assert not sent.is_next(Parcel(0, []))
    assert not sent.cut_off
    assert not sent.is_next(Parcel(2, []))  # the desk died with number 1
    assert sent.cut_off
    assert not sent.is_next(Parcel(1, []))


class FullStore:
    """A connection to a desk, through a Ray whose object store is full."""

    exceptions = SimpleNamespace(RayActorError=ConnectionError)
    beat = SimpleNamespace(remote=lambda *_: False)

    def get(self, value):
        return value

    def put(self, value):
        raise MemoryError("the object store is full")


def test_changes_that_cannot_be_sent_end_the_run_and_are_not_kept_quiet(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}")
    monkeypatch.setitem(sys.modules, "ray", FullStore())
    monkeypatch.setattr(ray_worker, "BEAT_S", 0.01)
    post = Post(SimpleNamespace(number=0, attempt=1), FullStore(), Outbox(tmp_path))
    with post.beating() as stop:
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert post.trouble == "MemoryError: the object store is full"
    assert post.sent == 0


@pytest.mark.parametrize(("workers", "cpus", "wanted"), [(1, 1.4, 2), (5, 0.5, 3), (2, None, 2), (1, 0.25, 1)])
def test_a_cluster_that_is_started_here_holds_the_runs_it_was_made_for(monkeypatch, workers, cpus, wanted):
    asked = {}
    fake = SimpleNamespace(init=lambda **settings: asked.update(settings), shutdown=lambda: None)
    monkeypatch.setattr(ray_cluster, "require", lambda *_: fake)
    with ray_cluster.connected(ray_cluster.RayOptions(cpus_per_run=cpus), workers):
        assert asked["num_cpus"] == wanted


class FakeRay:
    """`ray.nodes()` of two machines."""

    def nodes(self):
        return [
            {"Alive": True, "Resources": {"CPU": 8.0}},
            {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 4.0}},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]


def test_resources_must_be_on_one_node():
    assert missing_resource(FakeRay(), 8, 0) is None
    assert missing_resource(FakeRay(), 2, 4) is None
    assert missing_resource(FakeRay(), 4, 1) == "4 CPU and 1 GPU for a run (the largest has 2 CPU and 4 GPU)"
    assert missing_resource(FakeRay(), 64, 0) is not None
