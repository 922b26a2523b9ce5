"""The process that samples rollouts for verl on a CPU: one model on the hardware, which decodes requests in batches.

Requests are answered on the hardware of rollouts, and while the trainer evaluates, on that of evaluation.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.workers.rollout.replica import TokenOutput

from roundoff.config import ConfigError
from roundoff.errors import RoundoffWarning
from roundoff.hardware import InstalledHardware, hardware_phase, install
from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.plugins.verl.aqn_switch import AqnSwitch
from roundoff.plugins.verl.reports import phase_report
from roundoff.plugins.verl.settings import PluginSettings, from_environment
from roundoff.sampling.sampler import sample

GATHER_SECONDS = 0.05
"""How long the first request of a batch waits for others (s)."""


class Sampling(NamedTuple):
    """How tokens are chosen; requests that agree on this are decoded together."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One rollout that verl is waiting for."""

    prompt: list[int]
    sampling: Sampling
    answer: asyncio.Future[TokenOutput]


class RolloutServer:
    """A rollout replica, which verl calls like its vLLM server: one request a rollout."""

    def __init__(self, model: str, dtype: str, replica_rank: int, response_length: int) -> None:
        settings = from_environment(os.environ)
        if settings is None:
            raise ConfigError("this rollout process has no ROUNDOFF_VERL_SETTINGS: forward it to every process")
        self.settings: PluginSettings = settings
        torch.set_num_threads(1)
        self.loaded = load_model(model, dtype=getattr(torch, dtype))
        self.hardware: InstalledHardware | None = None
        if not settings.rollout_hardware.changes_nothing:
            self.hardware = install(self.loaded.model, settings.rollout_hardware, seed=settings.seed)
            for phase in ("rollout", "evaluation") if settings.rollout_hardware.has_phases else ("rollout",):
                lines = "\n".join(self.hardware.phases[phase].summary())
                print(f"roundoff: rollout replica {replica_rank}, hardware of {phase}:\n{lines}")
        seed_key = Key.from_seed(settings.seed)
        self.switch = AqnSwitch(self.loaded.model, settings.aqn, seed_key, settings.multipliers)
        self.replica_rank = replica_rank
        self.key = seed_key.fold("verl rollout", replica_rank)
        self.response_length = response_length
        self.global_steps: int | None = None
        self.batches = 0
        self.answered: Counter[str] = Counter()
        self.waiting: list[Request] = []
        self.gathering: asyncio.Task[None] | None = None
        self.worker = ThreadPoolExecutor(
            max_workers=1
        )  # one thread, so that uses of the model follow one another in order

    async def address(self) -> str:
        """A name that is unique among replicas; there is no socket behind it."""
        return f"roundoff:{self.replica_rank}"

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """Sample one rollout of a prompt."""
        limit = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or self.response_length
        sampling = Sampling(
            temperature=float(sampling_params.get("temperature", 1.0)),
            top_p=float(sampling_params.get("top_p", 1.0)),
            top_k=max(0, int(sampling_params.get("top_k", 0))),
            max_tokens=min(int(limit), self.response_length),
        )
        request = Request(list(prompt_ids), sampling, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        if self.gathering is None or self.gathering.done():
            self.gathering = asyncio.create_task(self._decode_waiting())
        return await request.answer

    async def _decode_waiting(self) -> None:
        """Decode batches until no request is waiting."""
        await asyncio.sleep(GATHER_SECONDS)
        while self.waiting:
            sampling = self.waiting[0].sampling
            batch = [request for request in self.waiting if request.sampling == sampling]
            self.waiting = [request for request in self.waiting if request.sampling != sampling]
            try:
                outputs = await self._in_worker(self._decode, [r.prompt for r in batch], sampling)
            except Exception as error:  # passed on to the requests, for which verl would otherwise wait for ever
                for request in batch:
                    request.answer.set_exception(error)
                continue
            for request, output in zip(batch, outputs, strict=True):
                request.answer.set_result(output)

    def _decode(self, prompts: list[list[int]], sampling: Sampling) -> list[TokenOutput]:
        self.batches += 1
        kind = self.switch.phase
        self.answered[f"{kind}, {'AQN' if self.switch.is_noisy else 'no AQN'}"] += len(prompts)
        with hardware_phase(self.loaded.model, kind):
            rollouts = sample(
                self.loaded.model,
                self.loaded.tokenizer,
                prompts,
                group_size=1,
                max_new_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                key=self.key.fold(self.batches),
            )
        if lost := int(rollouts.nonfinite.sum()):
            self.answered[f"{kind}, not computed: logits not finite"] += lost
            warnings.warn(
                f"{lost} of {len(prompts)} responses ({kind}) were not computed: the logits were not finite",
                RoundoffWarning,
                stacklevel=2,
            )
        outputs = []
        for n in range(len(prompts)):
            inside = rollouts.response_mask[n]
            outputs.append(
                TokenOutput(
                    token_ids=rollouts.tokens[n, rollouts.prompt_length :][inside].tolist(),
                    log_probs=rollouts.logprobs[n][inside].tolist(),
                    stop_reason="length" if bool(rollouts.truncated[n]) else "completed",
                    extra_fields={"global_steps": self.global_steps},
                )
            )
        return outputs

    async def update_weights(self, state: dict[str, Tensor], global_steps: int | None) -> None:
        """Copy the actor's weights into the model, and draw AQN's noise for the next rollouts.

        Raises:
            ConfigError: if names or shapes are not exactly those of this model.
        """
        await self._in_worker(self._write, state)
        self.global_steps = global_steps if global_steps is not None else self.global_steps

    def _write(self, state: dict[str, Tensor]) -> None:
        self.switch.before_sync()
        write_weights(self.loaded.model, state)
        self.switch.after_sync()

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a method by name, as vLLM's server does in its workers."""
        return await self._in_worker(getattr(self, method), *args)

    def roundoff_announce(self, step: int, sigma: float) -> None:
        """Note the step and sigma that the next sync is for."""
        self.switch.announce(step, sigma)

    def roundoff_evaluation(self, on: bool) -> None:
        """Begin or end an evaluation."""
        self.switch.evaluation(on)

    def roundoff_report(self, fingerprint: str) -> dict[str, Any]:
        """The hardware of this process, the weights it received, and what it has answered."""
        return {
            "replica": self.replica_rank,
            "pid": os.getpid(),
            "fingerprint": self.settings.fingerprint,
            **phase_report(self.settings.hardware, self.hardware, "rollout"),
            "evaluation": phase_report(self.settings.hardware, self.hardware, "evaluation"),
            "syncs": [asdict(sync) for sync in self.switch.syncs],
            "answered": dict(self.answered),
        }

    async def _in_worker(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)

    async def clear_kv_cache(self) -> None:
        """Do nothing: no cache outlives a batch."""

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Do nothing: the model never sleeps."""

    async def sleep(self) -> None:
        """Do nothing: the model stays in memory."""

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Do nothing: batches are short."""

    async def resume_generation(self) -> None:
        """Do nothing: generation was not stopped."""

    async def set_global_steps(self, global_steps: int) -> None:
        """Note the version of the weights, which every answer carries."""
        self.global_steps = global_steps


@torch.no_grad()
def write_weights(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Copy weights into a model by name.

    Raises:
        ConfigError: if names or shapes are not exactly those of the model (tied weights may come once).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    unknown = sorted(set(state) - set(parameters) - set(buffers))
    written = {id(parameters[name]) for name in state if name in parameters}
    missing = sorted(name for name, p in parameters.items() if id(p) not in written)
    if unknown or missing:
        raise ConfigError(f"weights of the actor do not fit the rollout model: missing {missing}, unknown {unknown}")
    for name, tensor in state.items():
        target = parameters.get(name, buffers.get(name))
        assert target is not None
        if target.shape != tensor.shape:
            raise ConfigError(f"{name} of the actor is {list(tensor.shape)}, but {list(target.shape)} in the rollout")
        target.copy_(tensor)
