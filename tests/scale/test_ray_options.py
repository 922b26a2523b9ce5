"""What is refused before anything is sent to a cluster; none of this starts Ray."""

import platform
import socket
import time

import pytest
from click.testing import CliRunner
from filelock import FileLock

from roundoff.cli import cli
from roundoff.config import ConfigError
from roundoff.scale.ray_cluster import check_address, missing_resource
from roundoff.scale.ray_worker import Desk, _check_shared, _check_versions, driver_versions


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
    assert str(result.exception) == "--gpus-per-run, --ray-sync does nothing without --ray"


def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"does not see .* use --ray-sync"):
        _check_shared(tmp_path / "nothing")
    probe = tmp_path / ".probe"
    with FileLock(probe):
        _check_shared(probe)
    probe.touch()
    with pytest.raises(RuntimeError, match=r"can take a lock .* two processes could write one run"):
        _check_shared(probe)


def test_a_node_with_other_versions_is_refused():
    _check_versions(driver_versions())
    with pytest.raises(RuntimeError, match=rf"node {platform.node()} has torch .*, the driver 1\.0"):
        _check_versions({**driver_versions(), "torch": "1.0"})


def test_the_desk_tells_an_attempt_that_was_given_up_to_stop():
    desk = Desk()
    assert not desk.beat(0, 1, "a", ["first"])
    assert not desk.beat(0, 2, "b", [])
    assert desk.beat(0, 1, "a", ["late"])
    assert desk.collect() == ({0: (2, "b")}, [(0, 1, ["first"])])
    assert desk.collect()[1] == []
    desk.stop()
    assert desk.beat(0, 2, "b", [])


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
