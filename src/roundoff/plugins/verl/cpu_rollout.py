"""A rollout backend of verl without vLLM, `actor_rollout_ref.rollout.name=roundoff`, for checks on a CPU.

Each replica is one Ray actor with one model on the hardware, from which `roundoff.sample` draws: formats, noise on
Linears and attention, and row ids are those of the training pass. It is slow compared with vLLM, and has only been run
on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import ray
import torch
from torch import Tensor
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from roundoff.config import ConfigError

NAME = "roundoff"
"""Name of the rollout backend."""


def server_name(replica_rank: int) -> str:
    """Name of the Ray actor that serves a replica."""
    return f"{NAME}_server_{replica_rank}"


class CpuReplica(RolloutReplica):  # type: ignore[misc]
    """One rollout server next to one actor worker."""

    async def launch_servers(self) -> None:
        """Start the server and wait until its model is on the hardware."""
        # Imported here, because the server's process imports that module first, which imports verl and so this one.
        from roundoff.plugins.verl.cpu_server import RolloutServer

        _check_world_size(self.config)
        server = (
            ray.remote(RolloutServer)
            .options(name=server_name(self.replica_rank), max_concurrency=self.max_concurrency, num_cpus=0)
            .remote(
                model=str(self.model_config.path),
                dtype=str(self.config.dtype),
                replica_rank=self.replica_rank,
                response_length=int(self.config.response_length),
            )
        )
        self.servers.append(server)
        self._server_handle = server
        self._server_address = await server.address.remote()


class ServerAdapter(BaseRollout):  # type: ignore[misc]
    """Sends an actor worker's weights to the replica beside it; each rank has a replica of its own."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        _check_world_size(self.config)
        self.replica_rank = int(os.environ["RANK"])
        self.is_leader_rank = True

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: no memory was released."""

    async def release(self) -> None:
        """Do nothing: the weights stay in memory."""

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Send every weight; the server refuses them if one is missing or unknown.

        Raises:
            ConfigError: under LoRA, which this rollout does not support.
        """
        if peft_config is not None or wire_format != "named_tensors":
            raise ConfigError("actor_rollout_ref.rollout.name=roundoff takes whole weights: no LoRA, no deltas")
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        await ray.get_actor(server_name(self.replica_rank)).update_weights.remote(state, global_steps)


def _check_world_size(config: Any) -> None:
    size = config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size
    if size != 1:
        raise ConfigError(
            "actor_rollout_ref.rollout.name=roundoff runs one process a replica: set "
            "actor_rollout_ref.rollout.tensor_model_parallel_size=1"
        )


def _load_replica() -> type[RolloutReplica]:
    return CpuReplica


def register() -> None:
    """Register the backend with verl."""
    RolloutReplicaRegistry.register(NAME, _load_replica)
    base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.{ServerAdapter.__name__}"
