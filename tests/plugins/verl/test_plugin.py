"""The plugin inside verl: activation, its errors, and one engine in one process (about 20 s each; `make test-verl`)."""

import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

import roundoff
from roundoff.plugins.verl.settings import VARIABLE, PluginSettings

pytest.importorskip("verl")
pytestmark = [pytest.mark.verl, pytest.mark.slow]

SOURCE = Path(roundoff.__file__).parents[1]
ENTRY = "roundoff.plugins.verl.entry"
NOISY = {"precision": {"weight": "mxfp4"}, "matmul_noise": {"relative_std": 0.1}}
LIST = (
    "import verl; from verl.workers.engine.base import EngineRegistry as E; "
    "from verl.trainer.ppo.v1 import get_trainer_cls as t; "
    "print(E.get_engine_cls('language_model', 'fsdp2').__name__, t('roundoff').__name__, t('sync').__name__)"
)


def environment(tmp_path, settings=None, **variables) -> dict[str, str]:
    """The environment of a verl process on the CPU; a plugin that is installed elsewhere plays no part."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "ROUNDOFF_"))}
    clean |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(tmp_path)}
    if settings is not None:
        clean[VARIABLE] = PluginSettings(**settings).model_dump_json()
    return clean | variables


def with_entry_point(tmp_path, **variables) -> dict[str, str]:
    """An environment in which a package with the entry point of pyproject.toml is installed."""
    metadata = tmp_path / "roundoff_here-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: roundoff-here\nVersion: 0\n")
    with (SOURCE.parent / "pyproject.toml").open("rb") as file:
        names = tomllib.load(file)["project"]["entry-points"]["verl.plugins"]
    lines = [f"{name} = {target}" for name, target in names.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    told = environment(tmp_path, **variables)
    told["PYTHONPATH"] += os.pathsep + str(tmp_path)
    return told


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False, **options)


def test_it_is_active_in_a_process_that_is_told_so(tmp_path):
    told = environment(tmp_path, {"hardware": NOISY}, VERL_USE_EXTERNAL_MODULES=ENTRY, VERL_PLATFORM="cpu")
    done = run("-c", LIST, env=told)
    assert done.stdout.split()[-3:] == ["RoundoffEngine", "RoundoffTrainer", "RoundoffTrainer"], done.stderr[-2000:]


def test_it_is_not_active_unasked(tmp_path):
    plain = environment(tmp_path, VERL_USE_EXTERNAL_MODULES=ENTRY)
    done = run("-c", f"import verl, {ENTRY} as entry; print(entry.ACTIVE)", env=plain)
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({VARIABLE: '{"hardware": {"precison": {}}}'}, "did you mean 'precision'"),
        ({"VERL_NOISY_OPS_ENABLED": "1", "VERL_NOISY_OPS_TYPE": "uniform"}, "must be 'relative_gaussian'"),
    ],
)
def test_bad_settings_end_the_process_where_it_imports_verl(tmp_path, variables, message):
    told = environment(tmp_path, VERL_USE_EXTERNAL_MODULES=ENTRY, **variables)
    done = run("-c", "import verl; print('went on')", env=told)
    assert done.returncode != 0
    assert message in done.stderr
    assert "went on" not in done.stdout


def test_the_variables_of_older_scripts_activate_it_through_the_entry_point(tmp_path):
    told = with_entry_point(tmp_path, VERL_NOISY_OPS_ENABLED="1", VERL_NOISY_OPS_SCALE="5e-2", VERL_PLATFORM="cpu")
    done = run("-c", LIST, env=told)
    assert done.stdout.split()[-3:] == ["RoundoffEngine", "RoundoffTrainer", "RoundoffTrainer"], done.stderr[-2000:]


def test_what_the_driver_was_told_reaches_processes_of_a_cluster_that_was_not(tmp_path):
    """Ray was started before: its processes do not have this shell's environment."""
    job = json.dumps({"runtime_env": {"env_vars": {"VERL_PLATFORM": "cpu"}}})  # Ray refuses a variable given twice
    told = with_entry_point(tmp_path, VERL_NOISY_OPS_ENABLED="1", VERL_PLATFORM="cpu", RAY_JOB_CONFIG_JSON_ENV_VAR=job)
    script = "import json, verl.trainer.main_ppo as m; print(json.dumps(m.get_ppo_ray_runtime_env()['env_vars']))"
    done = run("-c", script, env=told)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["VERL_NOISY_OPS_ENABLED"] == "1"
    assert found["VERL_USE_EXTERNAL_MODULES"] == ENTRY  # a node without roundoff fails
    assert "VERL_PLATFORM" not in found


FAILED = """
import verl
from types import SimpleNamespace as N
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from roundoff.plugins.verl.trainer import RoundoffTrainer

found = {"train": set(), "val": set()}
PPOTrainer._build_replay_buffer = lambda self: N(failure_keys=found, _sync_metadata_from_transfer_queue=lambda: None)
trainer = object.__new__(RoundoffTrainer)
for refill in (False, True):
    found["val"].clear()
    trainer.config = OmegaConf.create({"trainer": {"v1": {"sampler": {"sync_refill_failed_groups": refill}}}})
    sync = trainer._build_replay_buffer()._sync_metadata_from_transfer_queue
    sync()
    found["val"].add("prompt")
    try:
        sync()
        print("went on")
    except RuntimeError as error:
        print(error)
"""


def test_a_rollout_that_raises_ends_the_run(tmp_path):
    """verl alone would note the error and go on, and a score would be that of the other answers only."""
    told = environment(tmp_path, {"hardware": NOISY}, VERL_USE_EXTERNAL_MODULES=ENTRY, VERL_PLATFORM="cpu")
    done = run("-c", FAILED, env=told)
    stopped, went_on = done.stdout.splitlines()[-2:]
    assert stopped.startswith("rollouts or rewards of 1 prompts failed"), done.stderr[-2000:]
    assert went_on == "went on"


def test_the_entry_point_ends_the_process_too_though_verl_swallows_its_errors(tmp_path):
    told = with_entry_point(tmp_path, VERL_NOISY_OPS_ENABLED="1", VERL_NOISY_OPS_SCALE="much")
    done = run("-c", "import verl; print('went on')", env=told)
    assert done.returncode == 3
    assert "SCALE must be a number" in done.stderr
    assert "went on" not in done.stdout


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> dict:
    """What the process with one engine found."""
    return engine_result(tmp_path_factory.mktemp("engine"), {"hardware": NOISY})


def engine_result(tmp_path, settings, **variables):
    return process_result("engine_process.py", tmp_path, settings, **variables)


def process_result(script, tmp_path, settings, **variables):
    """What a script of this directory prints."""
    told = environment(tmp_path, settings, VERL_USE_EXTERNAL_MODULES=ENTRY, VERL_PLATFORM="cpu", **variables)
    done = run(str(Path(__file__).with_name(script)), str(tmp_path / "store"), env=told)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_the_engine_computes_on_the_hardware_and_its_names_stay(engine):
    assert engine["report"]["modules"] == 42  # 6 layers of 7 Linears
    assert engine["report"]["attention_layers"] == 6
    with safe_open(Path(roundoff.__file__).parent / "models" / "tiny" / "model.safetensors", "pt") as file:
        assert sorted(engine["names"]) == sorted(file.keys())


def test_the_noise_of_a_step_is_replayed(engine):
    assert engine["again"] == 0
    # Other micro-batches have other widths and so other float32 roundings (1e-7), which the model spreads.
    assert engine["other micro-batches"] < 1e-4
    assert engine["old against new"] < 1e-4
    assert engine["other step"] > 0.1


def test_the_gradient_is_finite_and_moves_every_weight(engine):
    assert math.isfinite(engine["gradient norm"])
    assert engine["gradient norm"] > 0
    # An embedding row that no text uses has no gradient, but the tensor has; so every tensor moves.
    assert set(engine["moved"]) == set(engine["names"])


def test_weights_are_quantized_again_after_a_step(engine):
    # FSDP2 gathers weights into one Parameter whose version stays 0, at an address that may or may not be another
    # (measured with two ranks): without the engine's own refresh, that the weights are fresh would be luck.
    assert engine["quantized weights are forgotten after the step"]
    assert engine["quantized is fresh"]
    assert not engine["quantized is stale"]


def test_a_batch_of_another_trainer_stops_the_run(engine):
    assert "trainer.v1.trainer_mode=roundoff" in engine["without a step"]


def test_recomputed_ratios_draw_again(tmp_path):
    found = engine_result(tmp_path, {"hardware": NOISY, "ratio": "recomputed"})
    assert found["again"] == 0
    assert found["old against new"] > 0.1


def test_the_engine_computes_on_the_hardware_of_training(tmp_path):
    phases = {"rollout": NOISY, "training": {"precision": {"weight": "hif8"}}}
    found = engine_result(tmp_path, {"hardware": phases, "ratio": "recomputed"})
    assert (found["report"]["phase"], found["report"]["hardware"]) == ("training", "weight hif8")
    assert found["old against new"] < 1e-4  # no noise in training
    assert found["quantized is fresh"]


@pytest.mark.parametrize("hardware", [NOISY, {"precision": {"kv_cache": "fp8_e4m3"}}], ids=["noise", "cache"])
def test_hardware_in_attention_refuses_packed_sequences(tmp_path, hardware):
    assert "use_remove_padding=False" in engine_result(tmp_path, {"hardware": hardware}, PACKED="1")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> dict:
    """What the process with one rollout server found."""
    aqn = {"sigma_start": 0.05, "sigma_end": 0.05, "schedule": "constant"}
    directory = tmp_path_factory.mktemp("server")
    return process_result("server_process.py", directory, {"hardware": NOISY, "aqn": aqn})


def test_waiting_requests_are_decoded_together_and_answered_each(server):
    assert server["batches"] == 3 + 1  # rollouts, evaluation, one more rollout; and the empty prompt, which fails
    assert len(server["responses"]) == 6
    assert server["lengths"] == [len(logprobs) for logprobs in server["logprobs"]]
    assert all(logprob <= 0 for logprobs in server["logprobs"] for logprob in logprobs)
    assert set(server["stops"]) <= {"completed", "length"}
    assert set(server["steps"]) == {0}
    assert server["one token"] == [1, "length"]


def test_the_server_counts_what_saw_aqn(server):
    assert server["report"]["answered"] == {"rollout, AQN": 8, "evaluation, no AQN": 3}
    assert server["report"]["modules"] == 42
    assert [sync["step"] for sync in server["report"]["syncs"]] == [1]


def test_wrong_weights_and_prompts_are_refused(server):
    assert "missing ['model.embed_tokens.weight'], unknown []" in server["errors"]["missing"]
    assert "unknown ['extra.weight']" in server["errors"]["unknown"]
    assert "model.norm.weight of the actor is [3]" in server["errors"]["shape"]
    assert "at least one token" in server["errors"]["empty prompt"]
