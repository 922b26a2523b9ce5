"""verl's FSDP engine, with the hardware installed before the model is sharded.

One engine is the actor, and another (`forward_only`) the reference; both compute on the hardware of training. Noise is
keyed by (seed, "update", step, row id), so that a pass can be repeated. With `ratio = "replayed"` the old, reference
and new log-probabilities see the same draws, and the importance ratio is 1 before the first update. With `"recomputed"`
the passes without gradient have draws of their own. The draw stays in force during the backward pass, in which gradient
checkpointing computes the forward pass again.

`Q(W)` is refreshed after each optimizer step and each loaded checkpoint. FSDP writes gathered weights without counting
a change, so the version counter on which `HardwareLinear` relies elsewhere says nothing here. This costs memory: each
rank holds `Q(W)` of the whole model (2 bytes a parameter in bfloat16), whatever FSDP shards.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from roundoff.config import ConfigError, Hardware
from roundoff.hardware import InstalledHardware, install, noise_key
from roundoff.numerics.rng import Key
from roundoff.numerics.transfer import fetch, put
from roundoff.plugins.verl.reports import phase_report
from roundoff.plugins.verl.rows import packed_rows, padded_rows, real_tokens
from roundoff.plugins.verl.settings import from_environment

STEP = "roundoff_step"
"""Name under which the trainer sends the training step (from 1) with each batch."""


class RoundoffEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine for language models under FSDP or FSDP2, on simulated hardware."""

    def _build_module(self) -> nn.Module:
        module: nn.Module = super()._build_module()
        settings = from_environment(os.environ)
        if settings is None:
            raise ConfigError("this process has no settings for roundoff's hardware, though its engine is in use")
        self._settings = settings
        self._noise = ExitStack()
        self._hardware: InstalledHardware | None = None
        self._keys_before = tuple(module.state_dict())
        hardware = settings.hardware.of("training")
        if not hardware.changes_nothing:
            self._check(hardware)
            self._hardware = install(module, hardware, seed=settings.seed)
            print(f"roundoff: rank {self.rank}, hardware of the {self.roundoff_role}:\n{self._hardware.summary()}")
        self._keys_after = tuple(module.state_dict())
        if self._keys_after != self._keys_before:
            raise RuntimeError("installing the hardware changed the names of the state dict: please report this")
        return module

    @property
    def roundoff_role(self) -> str:
        """`reference` for an engine that never trains, and `actor` for the other."""
        return "reference" if self.engine_config.forward_only else "actor"

    def roundoff_report(self) -> dict[str, Any]:
        """The hardware that this engine computes on, which the trainer checks and records."""
        hardware = self._hardware
        return {
            "role": self.roundoff_role,
            "rank": self.rank,
            "pid": os.getpid(),
            "fingerprint": self._settings.fingerprint,
            **phase_report(self._settings.hardware, hardware, "training"),
            "state_dict_keys": len(self._keys_after),
            "quantizations": 0 if hardware is None else hardware.quantizations(),
        }

    def _check(self, hardware: Hardware) -> None:
        """Refuse configurations under which the engine would compute something else than the settings say."""
        refused = {
            "actor_rollout_ref.actor.fsdp_config.qat.enable=True (verl's own quantization)": self._qat_enabled,
            "ulysses_sequence_parallel_size > 1": self.use_ulysses_sp,
            "pad_to_length=True": self.pad_to_length,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ConfigError(f"roundoff's hardware cannot be simulated with {setting}: leave it at its default")
        if hardware.concerns_attention and self.use_remove_padding:
            raise ConfigError(
                "hardware in attention (hardware.matmul_noise.attention = true, hardware.precision.kv_cache or "
                "attention), here that of training, needs whole sequences: set "
                "actor_rollout_ref.model.use_remove_padding=False, or set hardware.matmul_noise.attention = false and "
                "leave the formats out"
            )

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        """Run verl's loop over micro-batches, and end the draw of the last one after it."""
        try:
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        finally:
            self._noise.close()

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """Run verl's forward pass with the noise of this step; the draw stays in force for the backward pass."""
        self._noise.close()
        if self._hardware is not None:
            key = self._key(tu.get_non_tensor_data(data=micro_batch, key=STEP, default=None), forward_only)
            packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
            sequences: list[Tensor] = fetch(list(micro_batch["input_ids"].unbind()))  # one wait for the device
            rows = (packed_rows if packed else padded_rows)(sequences)
            there = put(rows, next(self.module.parameters()).device)
            real = None if packed else real_tokens(sequences)
            self._noise.enter_context(noise_key(self.module, key, there, host=rows, real=real))
        return super().forward_step(micro_batch, loss_function, forward_only)

    def _key(self, step: int | None, forward_only: bool) -> Key:
        if step is None:
            raise ConfigError(
                "a batch came without its training step: this run's trainer is not roundoff's, which would go on "
                "without AQN and without a check of the rollouts; set trainer.v1.trainer_mode=roundoff"
            )
        key = Key.from_seed(self._settings.seed).fold("update", step)
        return key.fold("old") if forward_only and self._settings.ratio == "recomputed" else key

    def optimizer_step(self) -> float:
        """Take verl's optimizer step, and quantize the weights again."""
        norm: float = super().optimizer_step()
        self._refresh()
        return norm

    def load_checkpoint(self, *args: Any, **options: Any) -> None:
        """Load a checkpoint as verl does, and quantize the weights again."""
        super().load_checkpoint(*args, **options)
        self._refresh()

    def _refresh(self) -> None:
        if self._hardware is not None:
            self._hardware.refresh()


def engine_reports(worker: Any) -> list[dict[str, Any]]:
    """The report of each engine of a verl worker, in whose process this runs.

    For an engine that is not roundoff's, the report names its class, and its fingerprint is None.
    """
    reports = []
    for inner in getattr(worker, "worker_dict", {"": worker}).values():
        for role in ("actor", "ref"):
            engine = getattr(getattr(inner, role, None), "engine", None)
            if isinstance(engine, RoundoffEngine):
                reports.append(engine.roundoff_report())
            elif engine is not None:
                reports.append({"role": role, "fingerprint": None, "engine": type(engine).__name__})
    return reports


def register(device: str, vendor: str) -> None:
    """Make verl build this engine for language models on a device; with a vendor's name it precedes verl's own."""
    for backend in ("fsdp", "fsdp2"):
        EngineRegistry.register(model_type="language_model", backend=backend, device=device, vendor=vendor)(
            RoundoffEngine
        )
