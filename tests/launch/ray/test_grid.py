"""Runs on a real Ray cluster of several nodes on this machine, some of which are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import load_experiment, load_profile
from roundoff.launch.local import run_grid
from roundoff.launch.ray.cluster import RayOptions
from roundoff.launch.ray.grid import run_on_ray
from roundoff.launch.request import RunRequest, execute
from roundoff.runs.record import read_metrics, read_run, read_status

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra"),
]
NAMES = ("quickstart-clean", "quickstart-mxfp4")
PROFILE = """
extends = "tiny"
[task]
settings = { train_problems = 96, test_problems = 32 }
[training]
prompts_per_step = 4
minibatches = 1
checkpoint_every = 1
"""
STEPS = 24  # a run takes seconds, so that it can be killed while it is at work


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "two-dozen-steps.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory, profile):
    """The same runs, made without Ray."""
    root = tmp_path_factory.mktemp("local")
    for request in requests_in(root, profile):
        execute(request, lambda: False)
    return root


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def requests_in(root: Path, profile: Path, names=NAMES) -> list[RunRequest]:
    return [RunRequest(load_experiment(n), load_profile(str(profile)), 0, root, {}, tracker="none") for n in names]


def reproducible(path: Path) -> list[dict]:
    rows = read_metrics(path)
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("seconds")} for row in rows]


def assert_same_as_local(root: Path, local: Path, names=NAMES) -> None:
    """Complete, every step once, and the bits of the run without Ray."""
    for name in names:
        ours, theirs = (next((r / name).glob("*/seed-0")) for r in (root, local))
        assert read_run(ours).is_final
        assert [row["step"] for row in read_metrics(ours)] == list(range(STEPS + 1))
        assert reproducible(ours) == reproducible(theirs)
        ends = [p / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors" for p in (ours, theirs)]
        assert ends[0].read_bytes() == ends[1].read_bytes()


def step_of(path: Path) -> int:
    """The last step with a checkpoint; -1 before the run has begun."""
    return read_status(path).step if (path / "status.json").exists() else -1


def workers_of(name: str) -> list[int]:
    """Processes that make a run of this experiment: Ray names them after their task."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(f"ray::{name} seed 0".encode()):
            found.append(int(process.name))
    return found


@pytest.mark.parametrize("sync", [False, True], ids=["shared", "sync"])
def test_runs_on_ray_have_the_bits_of_local_ones_and_are_made_once(tmp_path, profile, local, cluster, sync):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    seen = []
    options = RayOptions(cluster.address, sync=sync)
    requests = requests_in(tmp_path, profile)
    jobs = run_on_ray(requests, options, workers=None, watch=lambda jobs: seen.append([j.phase for j in jobs]))
    assert [(job.phase, job.message) for job in jobs] == [("complete", ""), ("complete", "")]
    assert ["running", "running"] in seen
    assert_same_as_local(tmp_path, local)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"}
    again = run_on_ray(requests, options, workers=None)
    assert [(job.phase, job.message) for job in again] == [("complete", "was complete")] * 2
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"} == before
    assert [job.phase for job in run_grid(requests, workers=1)] == ["complete", "complete"]


@pytest.mark.parametrize("sync", [False, True], ids=["shared", "sync"])
def test_a_killed_worker_is_replaced_and_the_run_goes_on(tmp_path, profile, local, cluster, sync):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    killed = []

    def kill_one(jobs):
        if not killed and step_of(jobs[0].request.path) >= 2:
            for pid in workers_of(NAMES[0]):
                os.kill(pid, signal.SIGKILL)
                killed.append((pid, step_of(jobs[0].request.path)))

    options = RayOptions(cluster.address, sync=sync)
    jobs = run_on_ray(requests_in(tmp_path, profile), options, workers=None, watch=kill_one)
    assert len(killed) == 1
    assert killed[0][1] < STEPS
    assert [job.phase for job in jobs] == ["complete", "complete"]
    assert jobs[0].resumed
    assert_same_as_local(tmp_path, local)


def test_a_worker_that_dies_each_time_is_given_up(tmp_path, profile, cluster):
    cluster.add_node(num_cpus=1)

    def kill(jobs):
        if step_of(jobs[0].request.path) >= 0:
            for pid in workers_of(NAMES[0]):
                os.kill(pid, signal.SIGKILL)

    jobs = run_on_ray(
        requests_in(tmp_path, profile, NAMES[:1]), RayOptions(cluster.address, retries=1), workers=None, watch=kill
    )
    assert jobs[0].phase == "failed"
    assert jobs[0].message.startswith("its worker died (")
    assert jobs[0].message.endswith("it can be resumed")
    assert read_run(jobs[0].request.path).status.state == "interrupted"


@pytest.mark.parametrize("sync", [False, True], ids=["shared", "sync"])
def test_a_removed_node_takes_its_run_elsewhere(tmp_path, profile, local, cluster, sync):
    nodes = {n.all_processes["raylet"][0].process.pid: n for n in (cluster.add_node(num_cpus=1) for _ in range(2))}
    removed = []

    def remove(jobs):
        if not removed and step_of(jobs[0].request.path) >= 2:
            for pid in workers_of(NAMES[0]):
                raylet = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                removed.append(raylet)
                cluster.remove_node(nodes[raylet], allow_graceful=False)

    options = RayOptions(cluster.address, sync=sync)
    jobs = run_on_ray(requests_in(tmp_path, profile, NAMES[:1]), options, workers=None, watch=remove)
    assert len(removed) == 1
    assert (jobs[0].phase, jobs[0].resumed) == ("complete", True)
    assert_same_as_local(tmp_path, local, NAMES[:1])


def driver(root: Path, profile: Path, address: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "roundoff", "run", *NAMES, "--seeds", "0", "--profile", str(profile)]
    command += ["--runs", str(root), "--tracker", "none", "--ray", address, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(root: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(step_of(path) >= step for path in root.glob("*/*/seed-0")):
            return
        time.sleep(0.05)
    raise AssertionError("no run came so far")


@pytest.mark.parametrize("sync", [False, True], ids=["shared", "sync"])
def test_a_killed_driver_started_again_finishes_every_run_once(tmp_path, profile, local, cluster, sync):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    options = ["--ray-sync"] if sync else []
    first = driver(tmp_path, profile, cluster.address, *options)
    wait_for_step(tmp_path, 2)
    first.kill()
    second = driver(tmp_path, profile, cluster.address, *options)
    output, _ = second.communicate(timeout=180)
    first.communicate(timeout=10)
    assert second.returncode == 0, output
    assert "resumed" in output
    assert_same_as_local(tmp_path, local)
    assert list(tmp_path.rglob("*.partial")) == []


def test_two_drivers_at_once_share_the_runs(tmp_path, profile, local, cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    drivers = [driver(tmp_path, profile, cluster.address) for _ in range(2)]
    outputs = [d.communicate(timeout=240)[0] for d in drivers]
    assert [d.returncode for d in drivers] == [0, 0], outputs
    assert_same_as_local(tmp_path, local)
    for name in NAMES:
        made = [f"{name} seed 0: step {STEPS}/{STEPS}" in o and f"{name} seed 0: complete\n" in o for o in outputs]
        assert sum(made) == 1, outputs  # the other driver found it complete


def test_a_driver_told_to_stop_lets_runs_save_and_the_next_goes_on(tmp_path, profile, local, cluster):
    cluster.add_node(num_cpus=1)
    first = driver(tmp_path, profile, cluster.address)
    wait_for_step(tmp_path, 1)
    first.terminate()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130, output
    assert "2 runs stopped before their end" in output
    [begun] = tmp_path.glob("*/*/seed-0/status.json")  # one CPU: the other was taken back before it began
    status = json.loads(begun.read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "stopped on request")
    second = driver(tmp_path, profile, cluster.address)
    output, _ = second.communicate(timeout=180)
    assert second.returncode == 0, output
    assert_same_as_local(tmp_path, local)


def test_a_run_that_cannot_be_made_fails_with_its_message_and_no_other(tmp_path, profile, cluster):
    cluster.add_node(num_cpus=1)
    good, bad = requests_in(tmp_path, profile)
    training = bad.profile.training.model_copy(update={"max_prompt_tokens": 2})
    wrong = RunRequest(bad.experiment, bad.profile.model_copy(update={"training": training}), 0, tmp_path, {}, "none")
    jobs = run_on_ray([wrong, good], RayOptions(cluster.address), workers=None)
    assert jobs[0].phase == "failed"
    assert jobs[0].message.startswith("profile.training.max_prompt_tokens is 2")
    assert jobs[1].phase == "complete"


def test_a_resource_that_no_node_has_is_named(tmp_path, profile):
    with pytest.raises(ConfigError, match=r"no node of the cluster has 1 CPU and 1 GPU for a run"):
        run_on_ray(requests_in(tmp_path, profile), RayOptions(gpus_per_run=1), workers=1)
