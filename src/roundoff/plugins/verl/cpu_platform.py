"""A platform for verl without accelerators, `VERL_PLATFORM=cpu`, to check a whole run on a CPU.

Ray is told that there are GPUs (logical ones, `+ray_kwargs.ray_init.num_gpus=N`), because verl uses them to place its
workers. Process groups use gloo. Two names in verl are replaced: the function that would ask torch for the backends
`cpu:gloo,cpu:gloo`, which torch refuses because the device is named twice; and, in the FSDP engine, the policy that
moves a reference model's weights to pinned memory, which torch offers only with an accelerator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils import distributed


def device_namespace() -> ModuleType:
    """`torch.cpu` with the functions that verl calls on `torch.cuda`: memory counters are 0, others do nothing."""
    namespace = ModuleType("roundoff_cpu")
    namespace.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")})
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize"):
        namespace.__dict__[name] = _nothing
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        namespace.__dict__[name] = _zero
    namespace.__dict__.update(
        get_device_name=_name,
        mem_get_info=_no_memory,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    return namespace


def _nothing(*_: Any) -> None:
    """Stand for functions that manage a device, which a CPU does not need."""


def _zero(*_: Any) -> int:
    return 0


def _name(*_: Any) -> str:
    return "CPU"  # the name in verl's table of devices


def _no_memory(*_: Any) -> tuple[int, int]:
    return 0, 0


class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """The CPU as a device of verl."""

    device_name = "cpu"
    vendor_name = "cpu"

    def __init__(self) -> None:
        self._namespace = device_namespace()

    @property
    def device_module(self) -> ModuleType:
        """The namespace that replaces `torch.cuda`."""
        return self._namespace

    def is_available(self) -> bool:
        """True: there is always a CPU."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """False: verl never chooses it by itself, only with `VERL_PLATFORM=cpu`."""
        return False

    def current_device(self) -> Any:
        """`cpu`; verl passes this to `Tensor.to`, where a number would mean a GPU."""
        return "cpu"

    def device_count(self) -> int:
        """Number of devices, which is one."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: the CPU has no work pending."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: torch's CPU allocator has no settings."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """(None, None): a CPU has no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """Name of torch's backend for process groups on a CPU."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Name of the variable that Ray sets for its resource GPU."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """Do nothing: no ranges are recorded."""
        yield

    def profiler_start(self) -> None:
        """Do nothing: there is no profiler."""

    def profiler_stop(self) -> None:
        """Do nothing: there is no profiler."""

    def ray_resource_name(self) -> str:
        """Name of Ray's resource for accelerators, of which the CPU has logical ones."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """No variables."""
        return []

    def is_ipc_supported(self) -> bool:
        """False: there is no device memory to share."""
        return False

    def cudart(self) -> Any:
        """None: there is no CUDA runtime."""


def register() -> None:
    """Register `VERL_PLATFORM=cpu` with verl, and make its process groups use gloo once."""
    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )


def register_engine() -> None:
    """Keep the weights of a reference model where they are, because they are in the CPU's memory already."""
    from verl.workers.engine.fsdp import transformer_impl

    transformer_impl.CPUOffloadPolicy = _no_offload


def _no_offload(pin_memory: bool = True) -> None:
    """Stand for FSDP2's policy object; None means no offload."""
