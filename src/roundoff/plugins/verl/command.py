"""The command that runs an experiment under verl: its settings as arguments of `verl.trainer.main_ppo`.

Whatever the arguments, verl differs from `roundoff run` in these points: its own data loader shuffles the prompts;
group filtering refills without a limit on batches (`algorithm.max_sampling_batches` has no effect); log-probabilities
before the update are always computed in a separate pass; and scores are verl's `val-core` metrics, with the hardware on
and AQN off, without intervals.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from roundoff.config import ConfigError, Experiment, Profile, RolloutCorrection, hardware_in_words
from roundoff.models.embedded import EMBEDDED
from roundoff.plugins.verl.hydra_values import number, quoted, quoted_json
from roundoff.plugins.verl.settings import ENTRY, MODULES, PLATFORM, VARIABLE, PluginSettings, check
from roundoff.plugins.verl.vllm_limits import check_vllm

if TYPE_CHECKING:
    from roundoff.srdd import LayerScan

WORKER_EXTENSION = "roundoff.plugins.verl.vllm_worker.HardwareWorker"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""Chat template that leaves the prompt as it is, for models asked without one."""

_AGGREGATION = {
    "token-mean": "token-mean",
    "sequence-mean": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """Files of a run under verl, and the devices that it may use."""

    train: Path
    """Parquet file of training problems in verl's form."""
    val: Path
    """Parquet file of test problems."""
    out: Path
    """Directory for checkpoints and `roundoff.json`."""
    devices: int = 1
    """Accelerators of each node."""
    nodes: int = 1


def plugin_settings(experiment: Experiment, seed: int, scan: LayerScan | None = None) -> PluginSettings:
    """The plugin's settings for an experiment; `scan` is the one that `keep = "srdd:k"` and `aqn.layers` refer to.

    Raises:
        ConfigError: if the experiment has a setting that cannot be carried out under verl.
    """
    ratio = experiment.algorithm.ratio_rule
    if ratio.splits_batches:
        raise ConfigError("algorithm.ratio = 'one' is not available under verl: use 'replayed', which gives 1 as well")
    if experiment.algorithm.loss == "reinforce":
        raise ConfigError(
            "algorithm.loss = 'reinforce' is not available under verl, which has it in bypass mode alone: set "
            "algorithm.correction.bypass_mode = true and loss_type = 'reinforce'"
        )
    if experiment.lora is not None and experiment.lora.dropout:
        raise ConfigError("lora.dropout is not available under verl's FSDP engine: set it to 0")
    hardware, multipliers = experiment.hardware, None
    if scan is not None:
        from roundoff.srdd import layer_multipliers, resolve_keep

        hardware = resolve_keep(hardware, scan)
        multipliers = layer_multipliers(experiment, scan, 0.0)
    return check(
        PluginSettings(
            experiment=experiment.id,
            hardware=hardware,
            aqn=experiment.aqn,
            multipliers=multipliers,
            ratio="replayed" if ratio.replays_noise else "recomputed",
            oversampling=experiment.algorithm.oversampling,
            seed=seed,
        )
    )


def command(
    experiment: Experiment, profile: Profile, seed: int, resources: Resources, scan: LayerScan | None = None
) -> str:
    """The complete shell command, one argument a line; a comment before it names the phases that differ.

    Raises:
        ConfigError: if a setting cannot be carried out under verl.
    """
    on_cpu = profile.device == "cpu"
    settings = plugin_settings(experiment, seed, scan)
    variables = {MODULES: ENTRY, VARIABLE: settings.model_dump_json(exclude_none=True)}
    as_json = settings.model_dump(mode="json", exclude_none=True)
    if on_cpu:
        variables[PLATFORM] = "cpu"
    arguments = [
        *_data(profile, seed, resources),
        *_model(experiment, profile),
        *_actor(experiment, profile, resources),
        *_rollout(experiment, profile, seed),
        *_algorithm(experiment, profile),
        *_trainer(experiment, profile, resources),
        *(_cpu(resources) if on_cpu else _vllm(settings)),
        *(
            # for every process on every node, even if Ray was started before this shell
            f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}={value}"
            for name, value in {**{n: quoted(v) for n, v in variables.items()}, VARIABLE: quoted_json(as_json)}.items()
        ),
    ]
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += ["python -m verl.trainer.main_ppo", *map(shlex.quote, arguments)]
    phases = hardware_in_words(settings.hardware) if settings.hardware.has_phases else ""
    return (f"# forward pass: {phases}\n" if phases else "") + " \\\n  ".join(lines)


def _data(profile: Profile, seed: int, resources: Resources) -> Iterator[str]:
    training = profile.training
    yield f"data.train_files={quoted(str(resources.train))}"
    yield f"data.val_files={quoted(str(resources.val))}"
    yield f"data.train_batch_size={training.prompts_per_step}"
    yield f"data.max_prompt_length={training.max_prompt_tokens}"
    yield f"data.max_response_length={training.max_new_tokens}"
    yield f"data.filter_overlong_prompts={training.long_prompts == 'filter'}"
    yield "data.truncation=error"
    yield f"data.seed={seed}"


def _model(experiment: Experiment, profile: Profile) -> Iterator[str]:
    model = "actor_rollout_ref.model"
    path = str(EMBEDDED.get(profile.model, profile.model))
    yield f"{model}.path={quoted(path)}"
    if profile.model in EMBEDDED or profile.chat is False:
        yield f"{model}.custom_chat_template={quoted(PLAIN_TEMPLATE)}"
        yield "actor_rollout_ref.rollout.agent.default_agent_loop=roundoff_plain"
    needs_padding = profile.device == "cpu" or experiment.hardware.of("training").concerns_attention
    yield f"{model}.use_remove_padding={not needs_padding}"
    if profile.device == "cpu":
        yield f"+{model}.override_config.attn_implementation=sdpa"
    yield f"{model}.enable_gradient_checkpointing={profile.training.gradient_checkpointing}"
    if experiment.lora is not None:
        targets = experiment.lora.targets
        listed = targets if isinstance(targets, str) else f"[{','.join(map(quoted, targets))}]"
        yield f"{model}.lora_rank={experiment.lora.rank}"
        yield f"{model}.lora_alpha={number(experiment.lora.alpha)}"
        yield f"{model}.target_modules={listed}"


def _actor(experiment: Experiment, profile: Profile, resources: Resources) -> Iterator[str]:
    training, algorithm = profile.training, experiment.algorithm
    if training.prompts_per_step % training.minibatches:
        raise ConfigError(
            f"profile.training.prompts_per_step ({training.prompts_per_step}) must be divisible by minibatches "
            f"({training.minibatches}) under verl"
        )
    prompts = training.prompts_per_step // training.minibatches
    ranks = resources.devices * resources.nodes
    if prompts * algorithm.group_size % ranks:
        raise ConfigError(
            f"a minibatch of {prompts} prompts x {algorithm.group_size} rollouts must be divisible by the "
            f"{ranks} devices under verl"
        )
    share = prompts * algorithm.group_size // ranks
    micro = _divisor(share, training.micro_batch or share)
    actor = "actor_rollout_ref.actor"
    yield f"{actor}.strategy=fsdp2"
    yield f"{actor}.ppo_mini_batch_size={prompts}"
    yield f"{actor}.ppo_micro_batch_size_per_gpu={micro}"
    yield f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={micro}"
    yield f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={micro}"
    rate = training.lora_learning_rate if experiment.lora is not None else training.learning_rate
    yield f"{actor}.optim.lr={number(rate)}"
    yield f"{actor}.optim.lr_warmup_steps={training.warmup_steps}"  # verl's scheduler also advances once a step
    yield f"{actor}.optim.weight_decay={number(training.weight_decay)}"
    yield f"{actor}.optim.betas=[{number(training.betas[0])},{number(training.betas[1])}]"
    yield f"{actor}.optim.clip_grad={number(training.gradient_clip)}"
    yield f"{actor}.ppo_epochs={algorithm.optimizer_epochs}"
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.loss == "gspo":
        low, high = algorithm.gspo_clip_low, algorithm.gspo_clip_high
    yield f"{actor}.clip_ratio={number(low)}"
    yield f"{actor}.clip_ratio_low={number(low)}"
    yield f"{actor}.clip_ratio_high={number(high)}"
    dual = algorithm.dual_clip or 1e6  # so high that it cuts nothing, as neither GRPO nor DAPO has it
    yield f"{actor}.clip_ratio_c={number(dual)}"
    if algorithm.loss != "clip":
        yield f"{actor}.policy_loss.loss_mode={algorithm.loss}"
    yield f"{actor}.loss_agg_mode={_AGGREGATION[algorithm.aggregation]}"
    yield f"{actor}.entropy_coeff={number(algorithm.entropy_coefficient)}"
    yield f"{actor}.use_kl_loss={algorithm.kl_coefficient > 0}"
    if algorithm.kl_coefficient > 0:
        yield f"{actor}.kl_loss_coef={number(algorithm.kl_coefficient)}"
        yield f"{actor}.kl_loss_type={algorithm.kl_estimator}"
    if algorithm.aggregation == "dr_grpo":
        yield f"{actor}.loss_scale_factor={training.max_new_tokens}"
    precision = "fp32" if profile.dtype == "float32" else "bf16"
    for part in (actor, "actor_rollout_ref.ref"):
        yield f"+{part}.fsdp_config.mixed_precision.param_dtype={precision}"
        yield f"{part}.fsdp_config.model_dtype=fp32"


def _divisor(share: int, limit: int) -> int:
    """The largest divisor of a device's share of a minibatch up to the limit, as verl's micro-batches have one size."""
    return next(size for size in range(min(share, limit), 0, -1) if share % size == 0)


def _rollout(experiment: Experiment, profile: Profile, seed: int) -> Iterator[str]:
    algorithm, rollout = experiment.algorithm, "actor_rollout_ref.rollout"
    yield f"{rollout}.n={algorithm.group_size}"
    yield f"{rollout}.temperature={number(algorithm.temperature)}"
    yield f"{rollout}.top_p={number(algorithm.top_p)}"
    yield f"{rollout}.top_k={algorithm.top_k or -1}"
    yield f"{rollout}.dtype={profile.dtype}"
    yield f"{rollout}.seed={seed}"
    yield f"{rollout}.tensor_model_parallel_size=1"
    yield f"{rollout}.calculate_log_probs=True"


def _algorithm(experiment: Experiment, profile: Profile) -> Iterator[str]:
    algorithm = experiment.algorithm
    yield "algorithm.adv_estimator=grpo"
    yield f"algorithm.norm_adv_by_std_in_grpo={algorithm.normalize_std}"
    yield "algorithm.use_kl_in_reward=False"
    yield f"algorithm.filter_groups.enable={algorithm.dynamic_sampling}"
    yield "algorithm.filter_groups.metric=reward"
    if algorithm.ratio_rule.corrects_rollouts:
        yield "algorithm.rollout_correction.rollout_is=token"
        yield f"algorithm.rollout_correction.rollout_is_threshold={number(algorithm.tis_cap)}"
    if algorithm.correction is not None:
        yield from _correction(algorithm.correction)
    reward = "reward.custom_reward_function"
    yield f"{reward}.path=pkg://roundoff.plugins.verl.reward"
    yield f"{reward}.name=compute_score"
    task = profile.task.located()  # verl's workers run in directories of their own
    yield f"+{reward}.reward_kwargs.task={quoted(task.name)}"
    yield f"+{reward}.reward_kwargs.settings={quoted_json(task.settings)}"
    length = round(algorithm.overlong_buffer * profile.training.max_new_tokens)
    if length and algorithm.overlong_factor:
        yield "reward.reward_manager.name=dapo"
        yield f"+reward.reward_kwargs.max_resp_len={profile.training.max_new_tokens}"
        yield "+reward.reward_kwargs.overlong_buffer_cfg.enable=True"
        yield f"+reward.reward_kwargs.overlong_buffer_cfg.len={length}"
        yield f"+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor={number(algorithm.overlong_factor)}"
        yield "+reward.reward_kwargs.overlong_buffer_cfg.log=False"


def _correction(correction: RolloutCorrection) -> Iterator[str]:
    """verl's own corrections, whose settings have the same names."""

    def threshold(lower: float | None, upper: float) -> str:
        return number(upper) if lower is None else f"{number(lower)}_{number(upper)}"

    setting = "algorithm.rollout_correction"
    if correction.has_weights:
        yield f"{setting}.rollout_is={correction.rollout_is}"
        yield f"{setting}.rollout_is_threshold={quoted(threshold(*correction.bounds))}"
        yield f"{setting}.rollout_is_batch_normalize={correction.rollout_is_batch_normalize}"
    if correction.rollout_rs:
        bounds = ",".join(threshold(lower, upper) for _, lower, upper in correction.rejections)
        yield f"{setting}.rollout_rs={quoted(','.join(correction.rollout_rs))}"
        yield f"{setting}.rollout_rs_threshold={quoted(bounds)}"
    if correction.bypass_mode:
        yield f"{setting}.bypass_mode=True"
        yield f"{setting}.loss_type={correction.loss_type}"


def _trainer(experiment: Experiment, profile: Profile, resources: Resources) -> Iterator[str]:
    training = profile.training
    yield "trainer.v1.trainer_mode=roundoff"
    yield f"trainer.n_gpus_per_node={resources.devices}"
    yield f"trainer.nnodes={resources.nodes}"
    yield f"trainer.total_epochs={experiment.epochs}"
    yield f"trainer.test_freq={training.evaluate_every}"
    yield f"trainer.save_freq={training.checkpoint_every}"
    yield f"trainer.max_actor_ckpt_to_keep={training.keep_checkpoints}"
    yield "trainer.val_before_train=True"
    yield f"trainer.default_local_dir={quoted(str(resources.out))}"
    yield "trainer.project_name=roundoff"
    yield f"trainer.experiment_name={quoted(experiment.id)}"
    yield "trainer.logger=[console,tensorboard]"


def _vllm(settings: PluginSettings) -> Iterator[str]:
    """Rollouts by vLLM on an accelerator."""
    check_vllm(settings.hardware)
    rollout = "actor_rollout_ref.rollout"
    yield f"{rollout}.name=vllm"
    yield f"{rollout}.enforce_eager=True"  # compiled graphs would not see the hardware
    yield f"{rollout}.enable_prefix_caching=False"
    yield f"+{rollout}.engine_kwargs.vllm.worker_extension_cls={WORKER_EXTENSION}"


def _cpu(resources: Resources) -> Iterator[str]:
    """The check on a CPU: logical devices, roundoff's own rollouts, and as few helper processes as verl allows."""
    rollout = "actor_rollout_ref.rollout"
    yield f"{rollout}.name=roundoff"
    yield f"{rollout}.free_cache_engine=False"
    yield f"{rollout}.agent.num_workers=1"
    yield "reward.num_workers=1"
    yield "data.dataloader_num_workers=0"
    yield "transfer_queue.backend.SimpleStorage.num_data_storage_units=1"
    for part in ("actor", "ref"):
        yield f"actor_rollout_ref.{part}.use_torch_compile=False"
        yield f"actor_rollout_ref.{part}.fsdp_config.use_torch_compile=False"
    yield "trainer.device=cpu"
    yield "+ray_kwargs.ray_init.address=local"  # a cluster that already runs here has no logical devices
    yield f"+ray_kwargs.ray_init.num_gpus={resources.devices}"
    yield f"ray_kwargs.ray_init.num_cpus={resources.devices + 8}"  # logical too; each process of verl asks for one
    yield "+ray_kwargs.ray_init.include_dashboard=False"
