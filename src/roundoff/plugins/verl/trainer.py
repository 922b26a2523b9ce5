"""verl's synchronous trainer, which also checks that every process has the hardware, and tells rollouts about AQN.

- Before the first weights are sent, every actor, reference and rollout process must report that it computes on the
  hardware of this run's settings. A process that does not ends the run, so that none computes without its hardware.
- Each weight sync is announced with the step whose rollouts it is for, counted from 1, and with AQN's sigma in that
  step. verl syncs once before the first step and once after each step; after the last sync there are no rollouts, and
  its sigma is 0.
- Each evaluation, including the one before training, is announced too. Rollout processes remove AQN's noise for it, and
  sample it on the hardware of evaluation.
- Hardware that vLLM cannot simulate is refused before any process starts.
- Each batch carries its step to the engines, which key their noise by it.
- A rollout or a reward that raises ends the run.

The reports of all processes are written to `roundoff.json` in `trainer.default_local_dir`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray
from omegaconf import open_dict
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from roundoff.aqn.schedule import sigma_curve
from roundoff.config import ConfigError
from roundoff.plugins.verl.engine import STEP, engine_reports
from roundoff.plugins.verl.reports import check_reports
from roundoff.plugins.verl.settings import PluginSettings, from_environment
from roundoff.plugins.verl.vllm_limits import check_vllm

MODE = "roundoff"
"""Name of the trainer in `trainer.v1.trainer_mode`; verl without the plugin does not know it and stops."""


class RoundoffTrainer(PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer on simulated hardware, with AQN."""

    def __init__(self, config: Any) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares with this name in many places
        settings = from_environment(os.environ)
        if settings is None:
            raise ConfigError("trainer.v1.trainer_mode=roundoff needs ROUNDOFF_VERL_SETTINGS in every process")
        if config.actor_rollout_ref.rollout.name == "vllm":
            check_vllm(settings.hardware)
        self._settings: PluginSettings = settings
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        """Build verl's buffer, but end the run if a rollout or a reward raises an error.

        verl would log it, train on the rest of the batch (the missing rollouts are padding), and average the score of
        an evaluation over what is left. With `trainer.v1.sampler.sync_refill_failed_groups=True` it replaces such
        groups in training; a user who sets that wants the run to go on.
        """
        buffer = super()._build_replay_buffer()
        if not self.config.trainer.v1.sampler.get("sync_refill_failed_groups", False):
            plain = buffer._sync_metadata_from_transfer_queue

            def checked() -> None:
                plain()
                failed = sum(len(keys) for keys in buffer.failure_keys.values())
                if failed:
                    raise RuntimeError(
                        f"rollouts or rewards of {failed} prompts failed; the log says why (_run_prompt). verl "
                        "would go on without them; to replace them in training set "
                        "trainer.v1.sampler.sync_refill_failed_groups=True"
                    )

            buffer._sync_metadata_from_transfer_queue = checked
        return buffer

    def _init_dataloader(self) -> None:
        """Make verl's data loaders; an epoch has fewer steps if more prompts are drawn than trained on."""
        super()._init_dataloader()
        if self._settings.oversampling == 1:
            return
        self.steps_per_epoch //= self._settings.oversampling
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{len(self.train_dataset)} training prompts do not fill one step of {self._settings.oversampling} x "
                f"{self.config.data.train_batch_size}: lower data.train_batch_size, or give more data"
            )
        if self.config.trainer.total_training_steps is None:
            self.total_training_steps = self.steps_per_epoch * self.config.trainer.total_epochs
            with open_dict(self.config):
                self.config.actor_rollout_ref.actor.optim.total_training_steps = self.total_training_steps

    def on_init_end(self) -> None:
        """Check every process, and send the first weights."""
        aqn = self._settings.aqn
        self._sigmas = [] if aqn is None else sigma_curve(self.total_training_steps, self.steps_per_epoch, aqn)
        check_reports(self._collect_reports(), self._settings)
        self._announce()
        super().on_init_end()
        self._record()

    def on_step_end(self) -> None:
        """Send the weights for the next step's rollouts."""
        self._announce()
        super().on_step_end()
        self._record()

    def on_validate_begin(self) -> None:
        """Make the rollout processes remove AQN's noise, and compute on the hardware of evaluation."""
        super().on_validate_begin()
        self._tell_rollouts("roundoff_evaluation", True)

    def on_validate_end(self) -> None:
        """Make the rollout processes add the same noise again, and compute on the hardware of rollouts."""
        self._tell_rollouts("roundoff_evaluation", False)
        self._record()
        super().on_validate_end()

    def _announce(self) -> None:
        self._tell_rollouts("roundoff_announce", self.global_steps + 1, self._sigma(self.global_steps + 1))

    def _sigma(self, step: int) -> float:
        """AQN's sigma for the rollouts of a step, counted from 1; 0 after the last step."""
        return self._sigmas[step - 1] if step <= len(self._sigmas) else 0.0

    def _consume_sync_metrics(self) -> dict[str, Any]:
        """verl's metrics of the sync, and the sigma of the rollouts on which the last step was trained."""
        return {**super()._consume_sync_metrics(), "roundoff/aqn_sigma": self._sigma(self.global_steps)}

    def _compute_old_log_prob(self, batch: Any, metrics: Any) -> Any:
        batch.extra_info[STEP] = self.global_steps
        return super()._compute_old_log_prob(batch, metrics=metrics)

    def _compute_ref_log_prob(self, batch: Any, metrics: Any) -> Any:
        batch.extra_info[STEP] = self.global_steps
        return super()._compute_ref_log_prob(batch, metrics=metrics)

    def _update_actor(self, batch: Any, metrics: Any) -> Any:
        batch.extra_info[STEP] = self.global_steps
        return super()._update_actor(batch, metrics=metrics)

    def _tell_rollouts(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method in every rollout server; returns the results, which are None from vLLM's servers."""
        replicas = self.llm_server_manager.get_replicas()
        servers = [server for replica in replicas for server in replica.servers]
        results = ray.get([server.collective_rpc.remote(method, args=arguments) for server in servers])
        if method == "roundoff_evaluation":  # cached keys and values were computed with other weights
            ray.get([server.clear_kv_cache.remote() for server in servers])
        return list(results)

    def _collect_reports(self) -> dict[str, list[Any]]:
        groups = {id(group): group for group in (self.actor_rollout_wg, getattr(self, "ref_policy_wg", None)) if group}
        workers = [worker for group in groups.values() for worker in group.workers]
        engines = ray.get([worker.__ray_call__.remote(engine_reports) for worker in workers])
        rollouts = self._tell_rollouts("roundoff_report", self._settings.fingerprint)
        return {"engines": engines, "rollouts": rollouts}

    def _record(self) -> None:
        content = {"settings": self._settings.model_dump(mode="json"), **self._collect_reports()}
        directory = Path(self.config.trainer.default_local_dir)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / "roundoff.json.tmp"
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(directory / "roundoff.json")


def register() -> None:
    """Register this trainer with verl, also under verl's own name `sync`, so that older scripts get the checks too."""
    trainer_base.register_trainer(MODE)(RoundoffTrainer)
    trainer_base.TRAINER_REGISTRY["sync"] = RoundoffTrainer
