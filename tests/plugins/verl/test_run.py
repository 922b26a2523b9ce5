"""A whole run under verl on the CPU, by the command that `roundoff verl-config` prints.

Two ranks of FSDP2, GRPO with DAPO's group filtering and a reference model, three steps, evaluations before, in between
and behind, AQN, MXFP4 weights and noise. Takes minutes and about 5 GB.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import roundoff

pytest.importorskip("verl")
pytestmark = [pytest.mark.verl, pytest.mark.slow]

EXPERIMENT = """
title = "check"
[algorithm]
name = "GRPO"
group_size = 4
dynamic_sampling = true
oversampling = 2
[hardware.precision]
weight = "mxfp4"
[hardware.matmul_noise]
relative_std = 0.05
[aqn]
schedule = "linear"
sigma_start = 0.05
sigma_end = 0.01
"""
PROFILE = """
title = "check"
model = "tiny"
device = "cpu"
[task]
name = "arithmetic"
settings = { train_problems = 48, test_problems = 16 }
[training]
prompts_per_step = 8
minibatches = 2
micro_batch = 3
learning_rate = 1e-4
lora_learning_rate = 1e-3
max_prompt_tokens = 16
max_new_tokens = 24
evaluate_every = 2
checkpoint_every = 3
"""
STEPS, RANKS = 3, 2  # an epoch: 48 problems, two drawn for each of the 8 prompts of a step


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The directory of a finished run."""
    here = tmp_path_factory.mktemp("verl")
    (here / "check.toml").write_text(EXPERIMENT)
    (here / "small.toml").write_text(PROFILE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "ROUNDOFF_"))}
    environment |= {
        "PYTHONPATH": str(Path(roundoff.__file__).parents[1]),
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp"),  # a socket's path must be short
        "VERL_FILE_LOGGER_PATH": str(here / "metrics.jsonl"),
    }
    words = ["verl-config", "check.toml", "--profile", "small.toml", "--devices", str(RANKS), "--write-data"]
    printed = subprocess.run(
        [sys.executable, "-m", "roundoff", *words, "--out", "out"],
        cwd=here, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = printed.stdout.strip() + " 'trainer.logger=[console,file]'"
    with (here / "log.txt").open("w") as log:
        done = subprocess.run(
            ["bash", "-c", command], cwd=here, env=environment, stdout=log, stderr=log, timeout=1500, check=False
        )
    assert done.returncode == 0, (here / "log.txt").read_text()[-5000:]
    return here


@pytest.fixture(scope="module")
def reports(directory) -> dict:
    """What the processes reported last."""
    return json.loads((directory / "out" / "roundoff.json").read_text())


@pytest.fixture(scope="module")
def metrics(directory) -> dict[int, dict]:
    """verl's metrics by step; step 0 is the evaluation before training."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["data"] for line in map(json.loads, lines)}


def test_every_actor_reference_and_rollout_process_has_the_hardware(reports):
    engines = [engine for worker in reports["engines"] for engine in worker]
    assert sorted((e["role"], e["rank"]) for e in engines) == [
        ("actor", 0), ("actor", 1), ("reference", 0), ("reference", 1),
    ]  # fmt: skip
    everywhere = engines + reports["rollouts"]
    assert len(reports["rollouts"]) == RANKS
    assert {(e["modules"], e["attention_layers"]) for e in everywhere} == {(42, 6)}
    assert len({e["fingerprint"] for e in everywhere}) == 1
    assert len({e["pid"] for e in everywhere}) == 2 * RANKS  # actor and reference share a process


def test_aqn_is_drawn_once_for_each_sync_and_alike_in_every_process(reports):
    one, other = (rollout["syncs"] for rollout in reports["rollouts"])
    assert one == other
    assert [sync["step"] for sync in one] == [1, 2, 3, 4]
    assert [sync["sigma"] for sync in one] == pytest.approx([0.05, 0.03, 0.01, 0.0])
    assert len({sync["noisy"] for sync in one}) == 4
    assert len({sync["clean"] for sync in one}) == 4  # the weights were trained and sent
    assert [sync["noisy"] == sync["clean"] for sync in one] == [False, False, False, True]


def test_no_evaluation_sees_aqn_and_every_rollout_does(reports):
    for rollout in reports["rollouts"]:
        assert set(rollout["answered"]) == {"evaluation, no AQN", "rollout, AQN"}
    evaluated = sum(rollout["answered"]["evaluation, no AQN"] for rollout in reports["rollouts"])
    assert evaluated == 3 * 16  # before training, at step 2 and at the last step, 16 problems each
    sampled = sum(rollout["answered"]["rollout, AQN"] for rollout in reports["rollouts"])
    assert sampled >= STEPS * 8 * 4


def test_the_state_dict_keeps_its_names(reports):
    with safe_open(Path(roundoff.__file__).parent / "models" / "tiny" / "model.safetensors", "pt") as file:
        count = len(file.keys())
    assert {e["state_dict_keys"] for worker in reports["engines"] for e in worker} == {count}


def test_gradients_are_finite_and_not_zero(metrics):
    norms = [metrics[step]["actor/grad_norm"] for step in range(1, STEPS + 1)]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms), norms


def test_old_log_probabilities_are_replayed(metrics):
    # Step by step the first of two minibatches has a ratio of 1 but for rounding, the second one update away.
    assert all(abs(metrics[step]["actor/ppo_kl"]) < 0.1 for step in range(1, STEPS + 1))


def test_sigma_is_logged_and_groups_of_equal_reward_are_replaced(metrics):
    assert [metrics[step]["roundoff/aqn_sigma"] for step in (1, 2, 3)] == pytest.approx([0.05, 0.03, 0.01])
    evicted = [value for step in (1, 2, 3) for name, value in metrics[step].items() if "filter_groups/evicted" in name]
    assert sum(evicted) > 0


def test_scores_come_with_the_evaluations(metrics):
    scored = [step for step, data in metrics.items() if any(name.startswith("val-core/") for name in data)]
    assert sorted(scored) == [0, 2, 3]


def test_the_checkpoint_is_one_that_verl_can_go_on_from(directory):
    assert (directory / "out" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert list((directory / "out" / "global_step_3" / "actor").glob("model_world_size_2_rank_*.pt"))
