"""The command for verl holds every setting of experiment and profile; what verl cannot carry out is refused."""

import json
import shlex

import pytest
from click.testing import CliRunner

from roundoff.actions.verl_config import read_scan
from roundoff.cli import cli
from roundoff.config import ConfigError, Precision
from roundoff.experiments import load_profile, select, with_overrides
from roundoff.plugins.verl.command import Resources, command, plugin_settings
from roundoff.plugins.verl.hydra_values import quoted
from roundoff.plugins.verl.settings import VARIABLE, from_environment

GPU = ("profile.device=cuda", "profile.dtype=bfloat16", "profile.model=/models/qwen")
VLLM = (*GPU, "hardware.matmul_noise.attention=false")


def words(tmp_path, name="quickstart-noise-aqn", *assignments, devices=2, seed=7) -> tuple[dict[str, str], dict]:
    """Environment variables and arguments of the command, as a shell reads them."""
    experiments, profile = with_overrides(select([name]), load_profile("tiny"), assignments)
    resources = Resources(tmp_path / "train.parquet", tmp_path / "val.parquet", tmp_path / "out", devices=devices)
    text = command(experiments[0], profile, seed, resources)
    found = shlex.split(text.replace("\\\n", ""), comments=True)
    start = found.index("python")
    assert found[start : start + 3] == ["python", "-m", "verl.trainer.main_ppo"]
    variables = dict(word.split("=", 1) for word in found[:start])
    arguments = dict(word.lstrip("+").split("=", 1) for word in found[start + 3 :])
    assert len(arguments) == len(found) - start - 3, "an argument is given twice"
    return variables, arguments


def test_the_settings_reach_every_process(tmp_path):
    variables, arguments = words(tmp_path)
    settings = from_environment(variables)
    assert settings.hardware.matmul_noise.relative_std == 0.1
    assert (settings.aqn.sigma_start, settings.seed, settings.ratio) == (0.05, 7, "replayed")
    forwarded = arguments[f"ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}"]
    assert json.loads(forwarded.strip("'")) == json.loads(variables[VARIABLE])
    assert variables["VERL_USE_EXTERNAL_MODULES"] == "roundoff.plugins.verl.entry"
    assert arguments["trainer.v1.trainer_mode"] == "roundoff"
    assert arguments["ray_kwargs.ray_init.address"] == "local"  # whatever cluster runs here: its devices are not these


def test_the_profile_and_the_algorithm_are_in_it(tmp_path):
    _, arguments = words(tmp_path, "quickstart-noise", "algorithm.kl_coefficient=0.002", "algorithm.clip_high=0.28")
    assert arguments["data.train_batch_size"] == "64"
    assert arguments["actor_rollout_ref.actor.ppo_mini_batch_size"] == "32"
    assert arguments["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == "128"  # 32 prompts x 8 / 2 devices
    assert arguments["actor_rollout_ref.rollout.n"] == "8"
    assert arguments["actor_rollout_ref.actor.optim.lr"] == "0.0001"
    assert arguments["actor_rollout_ref.actor.kl_loss_coef"] == "0.002"
    assert arguments["actor_rollout_ref.actor.clip_ratio_high"] == "0.28"
    assert arguments["trainer.test_freq"] == "10"
    assert arguments["algorithm.filter_groups.enable"] == "False"
    assert "reward.reward_manager.name" not in arguments


def test_warm_up_and_entropy_bonus_are_in_it(tmp_path):
    """verl moves its learning rate once a step, as roundoff does, however many minibatches a step has."""
    settings = ("profile.training.warmup_steps=10", "algorithm.entropy_coefficient=0.01")
    _, arguments = words(tmp_path, "quickstart-noise", *settings)
    assert arguments["actor_rollout_ref.actor.ppo_mini_batch_size"] == "32"  # two a step
    assert arguments["actor_rollout_ref.actor.optim.lr_warmup_steps"] == "10"
    assert arguments["actor_rollout_ref.actor.entropy_coeff"] == "0.01"


def test_micro_batches_divide_the_share_of_a_device(tmp_path):
    """Otherwise verl stops at its first update. 32 prompts x 5 rollouts on 8 devices are 20 rollouts each."""
    experiments, profile = with_overrides(
        select(["E5b"]), load_profile("gsm8k-1.5b"), ("hardware.matmul_noise.attention=false",)
    )
    text = command(experiments[0], profile, 0, Resources(tmp_path, tmp_path, tmp_path, devices=8))
    assert profile.training.micro_batch == 8
    assert "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5 " in text
    _, whole = words(tmp_path, "quickstart-noise", "profile.training.micro_batch=1000")
    assert whole["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == "128"


def test_an_epoch_that_draws_more_than_it_trains_on_is_told_of(tmp_path):
    variables, _ = words(tmp_path, "quickstart-noise", "algorithm.dynamic_sampling=true", "algorithm.oversampling=2")
    assert from_environment(variables).oversampling == 2


def test_plain_prompts_are_asked_without_the_models_chat_template(tmp_path):
    pytest.importorskip("pyarrow")
    base = ["verl-config", "quickstart-mxfp4", "--data", str(tmp_path), "--set", "profile.model=/models/qwen"]
    result = CliRunner().invoke(cli, [*base, "--write-data"])
    assert result.exit_code == 0, result.output
    assert "roundoff_plain" in result.stdout  # arithmetic asks no conversations
    assert (tmp_path / "train.parquet").is_file()


def test_settings_of_dapo_are_in_it(tmp_path):
    _, arguments = words(tmp_path, "quickstart-noise", "algorithm.name=DAPO", "algorithm.overlong_buffer=0.25")
    _, on = words(tmp_path, "quickstart-noise", "algorithm.dynamic_sampling=true", "algorithm.overlong_buffer=0.25")
    assert on["algorithm.filter_groups.enable"] == "True"
    assert on["reward.reward_manager.name"] == "dapo"
    assert on["reward.reward_kwargs.overlong_buffer_cfg.len"] == "6"  # a quarter of 24
    assert arguments["reward.reward_kwargs.max_resp_len"] == "24"


def test_settings_of_lora_are_in_it(tmp_path):
    _, arguments = words(tmp_path, "quickstart-noise")
    assert "actor_rollout_ref.model.lora_rank" not in arguments
    experiments, profile = with_overrides(select(["quickstart-noise"]), load_profile("tiny"), ())
    from roundoff.config import LoRA

    experiment = experiments[0].model_copy(update={"lora": LoRA(rank=4, targets=("q_proj", "v_proj"))})
    text = command(experiment, profile, 0, Resources(tmp_path, tmp_path, tmp_path))
    assert "actor_rollout_ref.model.lora_rank=4" in text
    assert "target_modules=[q_proj,v_proj]" in text
    assert "actor_rollout_ref.actor.optim.lr=0.001" in text


def test_an_accelerator_means_vllm_with_our_workers(tmp_path):
    variables, arguments = words(tmp_path, "quickstart-noise", *GPU, "hardware.matmul_noise.attention=false")
    assert arguments["actor_rollout_ref.rollout.name"] == "vllm"
    assert arguments["actor_rollout_ref.rollout.enforce_eager"] == "True"
    extension = arguments["actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls"]
    assert extension == "roundoff.plugins.verl.vllm_worker.HardwareWorker"
    assert arguments["actor_rollout_ref.model.use_remove_padding"] == "True"
    assert arguments["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"] == "bf16"
    assert "VERL_PLATFORM" not in variables


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (GPU, "attention = true cannot be simulated in vLLM"),
        (
            (*GPU, "hardware.matmul_noise.attention=false", "hardware.evaluation.precision.weight=mxfp4"),
            "holds the quantized weights of one phase",
        ),
        (
            (*GPU, "hardware.training.matmul_noise.attention=false", "algorithm.ratio=recomputed"),
            "--set hardware.rollout.matmul_noise.attention=false",
        ),
        (("hardware.rollout.matmul_noise.relative_std=0.2",), "algorithm.ratio = 'replayed' means nothing here"),
        ((*VLLM, "hardware.accumulator={bits=13}"), "hardware.accumulator is not simulated in vLLM"),
        ((*VLLM, "hardware.matmul_noise.gain_std=0.02"), "hardware.matmul_noise.gain_std is not simulated"),
        ((*VLLM, 'hardware.matmul_noise.scale="row"'), "hardware.matmul_noise.scale is not simulated in vLLM"),
        (
            (*GPU, "hardware.matmul_noise.attention=false", "hardware.precision.kv_cache=fp8_e4m3"),
            "precision.kv_cache is not simulated in vLLM",
        ),
        (
            (*GPU, "hardware.matmul_noise.attention=false", "hardware.precision.attention=int8"),
            "precision.attention is not simulated in vLLM",
        ),
        (("algorithm.ratio=one",), "algorithm.ratio = 'one' is not available"),
        (("profile.training.minibatches=3",), "must be divisible by minibatches"),
        (("algorithm.group_size=3", "profile.training.prompts_per_step=2"), "must be divisible by the 2 devices"),
        (("aqn.layers=targeted",), "aqn.layers = 'targeted' needs a scan"),
        (("aqn.layers=zone",), "changes during the run"),
    ],
)
def test_what_verl_cannot_carry_out_is_refused(tmp_path, assignments, message):
    with pytest.raises(ConfigError, match=message):
        words(tmp_path, "quickstart-noise-aqn", *assignments)


PHASES = (
    "hardware.rollout.precision.weight=nvfp4",
    "hardware.training.matmul_noise.relative_std=0.1",
    "hardware.evaluation.precision.activation=mxfp4",
    "algorithm.ratio=recomputed",
)


def test_phases_reach_every_process(tmp_path):
    variables, arguments = words(tmp_path, "quickstart-clean", *PHASES)
    settings = from_environment(variables)
    assert settings.hardware.of("rollout").precision.weight == "nvfp4"
    assert settings.hardware.of("training").matmul_noise.relative_std == 0.1
    assert settings.hardware.of("evaluation").precision == Precision(activation="mxfp4")
    forwarded = arguments[f"ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}"]
    assert from_environment({VARIABLE: forwarded.strip("'")}) == settings
    experiments, profile = with_overrides(select(["quickstart-clean"]), load_profile("tiny"), PHASES)
    text = command(experiments[0], profile, 0, Resources(tmp_path, tmp_path, tmp_path))
    first = "# forward pass: rollout: weight nvfp4; training: matmul noise 0.1; evaluation: activation mxfp4"
    assert text.splitlines()[0] == first


def test_attention_noise_in_training_alone_goes_with_vllm_and_needs_whole_sequences(tmp_path):
    alone = ("hardware.training.matmul_noise.relative_std=0.1", "algorithm.ratio=recomputed")
    _, arguments = words(tmp_path, "quickstart-clean", *GPU, *alone)
    assert arguments["actor_rollout_ref.model.use_remove_padding"] == "False"
    _, arguments = words(tmp_path, "quickstart-clean", *GPU, *alone, "hardware.matmul_noise.attention=false")
    assert arguments["actor_rollout_ref.model.use_remove_padding"] == "True"


@pytest.mark.parametrize(("text", "value"), [("/a/b.c", "/a/b.c"), ("/a b", '"/a b"'), ('{"a": 1}', "'{\"a\": 1}'")])
def test_values_are_quoted_for_hydra(text, value):
    assert quoted(text) == value


def test_verl_config_prints_the_command_and_notes_absent_data(tmp_path):
    result = CliRunner().invoke(cli, ["verl-config", "quickstart-mxfp4", "--seed", "2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "does not exist yet" in result.stderr
    assert f"trainer.default_local_dir={tmp_path / 'out'}" in result.stdout
    assert '"weight":"mxfp4"' in result.stdout


def test_a_scan_gives_the_multipliers_and_the_kept_layers(tmp_path):
    from roundoff.srdd import LayerScan
    from roundoff.srdd.layer_scan import LayerMetrics

    names = [field for field in LayerMetrics.__dataclass_fields__ if field != "layer"]
    rows = [LayerMetrics(layer=n, **dict.fromkeys(names, float(6 - n))) for n in range(6)]
    experiments, _ = with_overrides(
        select(["quickstart-noise-aqn"]),
        load_profile("tiny"),
        ("aqn.layers=targeted", "hardware.precision.weight=mxfp4", "hardware.precision.keep=srdd:2"),
    )
    scan = LayerScan(experiments[0].hardware, 1, tuple(rows), (), (), "gradient")
    settings = plugin_settings(experiments[0], 0, scan)
    assert settings.hardware.precision.keep == (0, 1)
    assert set(settings.multipliers.values()) == {0.0, 1.0}
    assert settings.multipliers[0] == 1.0
    assert from_environment({VARIABLE: settings.model_dump_json()}) == settings


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no file"), ("{}", "not a scan"), ("{", "not a scan")]
)
def test_a_file_that_is_no_scan_is_refused(tmp_path, content, message):
    path = tmp_path / "scan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_scan(path)


def test_corrections_are_verls_own(tmp_path):
    chosen = ["algorithm.ratio='recomputed'", "algorithm.correction.rollout_is='token'"]
    chosen += ["algorithm.correction.rollout_is_threshold=[0.5, 5.0]", "algorithm.correction.rollout_rs='seq_mean_k1'"]
    chosen += ["algorithm.correction.rollout_rs_threshold=1.25"]
    _, arguments = words(tmp_path, "quickstart-noise", *chosen)
    prefix = "algorithm.rollout_correction."
    found = {k.removeprefix(prefix): v.strip("'\"") for k, v in arguments.items() if k.startswith(prefix)}
    assert found == {
        "rollout_is": "token",
        "rollout_is_threshold": "0.5_5.0",
        "rollout_is_batch_normalize": "False",
        "rollout_rs": "seq_mean_k1",
        "rollout_rs_threshold": "0.8_1.25",
    }
    bypass = ["algorithm.ratio='recomputed'", "algorithm.correction={bypass_mode=true, loss_type='reinforce'}"]
    _, arguments = words(tmp_path, "quickstart-noise", *bypass)
    assert {arguments[f"{prefix}bypass_mode"], arguments[f"{prefix}loss_type"]} == {"True", "reinforce"}


def test_other_losses_are_verls_own(tmp_path):
    actor = "actor_rollout_ref.actor"
    _, arguments = words(tmp_path, "quickstart-noise", "algorithm.loss='gspo'")
    assert arguments[f"{actor}.policy_loss.loss_mode"] == "gspo"
    assert [arguments[f"{actor}.clip_ratio_{end}"] for end in ("low", "high")] == ["0.0003", "0.0004"]
    _, arguments = words(tmp_path, "quickstart-noise", "algorithm.dual_clip=3.0")
    assert arguments[f"{actor}.clip_ratio_c"] == "3.0" and f"{actor}.policy_loss.loss_mode" not in arguments
    with pytest.raises(ConfigError, match="loss = 'reinforce' is not available under verl"):
        words(tmp_path, "quickstart-noise", "algorithm.loss='reinforce'")
