"""torchrun with two real processes over gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roundoff.runs.record import read_metrics, read_run
from tests.broken_models import overflowing_model
from tests.parallel.test_ranks import assert_same_to_rounding, metrics

pytestmark = pytest.mark.slow
PROFILE = """
extends = "tiny"
[task]
settings = { train_problems = 24, test_problems = 32 }
[training]
prompts_per_step = 8
checkpoint_every = 1
"""
LONG = PROFILE.replace("24", "800")


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "three-steps.toml"
    path.write_text(PROFILE)
    return path


def arguments(root: Path, profile: Path, *names: str) -> list[str]:
    return ["run", *names, "--seeds", "0", "--profile", str(profile), "--runs", str(root), "--tracker", "none"]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings
    )


def torchrun(*command: str) -> subprocess.Popen:
    return start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "roundoff", *command])


def only(root: Path, name: str) -> Path:
    return next((root / name).glob("*/seed-0"))


def test_two_processes_make_the_metrics_of_one(tmp_path, profile):
    names = ("quickstart-clean", "quickstart-mxfp4")
    two = torchrun(*arguments(tmp_path / "two", profile, *names))
    output, _ = two.communicate(timeout=240)
    assert two.returncode == 0, output
    assert output.count("quickstart-clean seed 0: complete") == 1  # the second rank says nothing
    one = start(["roundoff", *arguments(tmp_path / "one", profile, *names)])
    output, _ = one.communicate(timeout=240)
    assert one.returncode == 0, output
    for name in names:
        assert_same_to_rounding(metrics(only(tmp_path / "one", name)), metrics(only(tmp_path / "two", name)))
    assert read_run(only(tmp_path / "two", names[0])).provenance["ranks"] == 2


def test_sigterm_stops_both_after_one_step_and_one_process_goes_on(tmp_path):
    profile = tmp_path / "hundred-steps.toml"
    profile.write_text(LONG)
    two = torchrun(*arguments(tmp_path / "runs", profile, "quickstart-clean"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list((tmp_path / "runs").glob("*/*/seed-0"))
        if found and len(read_metrics(found[0])) > 2:
            break
        time.sleep(0.1)
    two.send_signal(signal.SIGTERM)
    output, _ = two.communicate(timeout=60)
    stopped = read_run(found[0])
    assert (stopped.status.state, stopped.status.reason) == ("interrupted", "stopped on request"), output
    assert stopped.metrics[-1]["step"] == stopped.status.step < 100
    again = start(["roundoff", *arguments(tmp_path / "runs", profile, "quickstart-clean")])
    while len(read_metrics(found[0])) < stopped.status.step + 3 and again.poll() is None:
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    output, _ = again.communicate(timeout=60)
    assert "quickstart-clean seed 0: resumed" in output
    steps = [row["step"] for row in read_metrics(found[0])]
    assert steps == list(range(len(steps)))


def test_ranks_that_disagree_are_refused_before_anything_is_written(tmp_path, profile):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    command = ["roundoff", *arguments(tmp_path / "runs", profile, "quickstart-clean")]
    other = [*command, "--set", "profile.training.learning_rate=0.5"]
    ranks = [start(c, RANK=str(i), LOCAL_RANK=str(i), **common) for i, c in enumerate((command, other))]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 2
        assert "roundoff: ranks disagree on the configuration: rank 0 has 1 runs from quickstart-clean" in output
    assert not (tmp_path / "runs").exists()


def test_more_runs_at_a_time_are_refused_under_torchrun(tmp_path, profile):
    command = ["roundoff", *arguments(tmp_path / "runs", profile, "quickstart-clean"), "--workers", "2"]
    refused = start(command, TORCHELASTIC_RUN_ID="test", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "roundoff: under torchrun one run is made at a time" in output


EXCHANGE = """
import torch
from roundoff.parallel.ranks import joined

with joined("cpu") as ranks:
    large = torch.arange(100_000.0) if ranks.leads else None  # nobody else pads to its size
    for value in (ranks.index, (large, "a" * ranks.index), torch.full((3,), ranks.index)):
        found = ranks.gather(value)
        assert len(found) == 2
    assert found[1].tolist() == [1, 1, 1]
    assert torch.equal(ranks.first(lambda: torch.arange(100_000.0)), torch.arange(100_000.0))
    try:
        ranks.gather(object() if ranks.index else 1)
    except TypeError as error:
        assert "rank 1" in str(error)
    print("exchanged")
"""


def test_real_processes_exchange_without_pickle(tmp_path):
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    process = start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("exchanged") == 2


def test_a_model_that_is_broken_ends_both_ranks_with_one_message(tmp_path, profile):
    directory = overflowing_model(tmp_path / "model")
    command = arguments(tmp_path / "runs", profile, "quickstart-noise")
    process = torchrun(*command, "--set", f"profile.model={directory}")
    output, _ = process.communicate(timeout=120)  # neither rank waits for the other
    assert process.returncode != 0
    assert output.count("failed: quickstart-noise seed 0: ") == 1
    assert "first in model.layers.1.mlp.up_proj" in output
