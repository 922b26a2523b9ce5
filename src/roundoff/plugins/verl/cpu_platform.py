"""A platform for verl without accelerators: `VERL_PLATFORM=cpu`, for checks of a whole run on a CPU.

Ray is told that there are GPUs (`+ray_kwargs.ray_init.num_gpus=N`, logical ones), because verl places its workers by
them. Process groups use gloo. Two names in verl are replaced: the function that would ask torch for the backends
`cpu:gloo,cpu:gloo`, which torch refuses because the device is named twice; and, in the FSDP engine, the policy that
moves a reference model's weights to pinned memory, which torch has only beside an accelerator.
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
    """`torch.cpu` with what verl calls on `torch.cuda`: memory counters read 0, and devices need not be chosen."""
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
    """Of a device's bookkeeping a CPU has none."""


def _zero(*_: Any) -> int:
    return 0


def _name(*_: Any) -> str:
    return "CPU"  # as verl's table of devices calls it


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
        """Stands for `torch.cuda`."""
        return self._namespace

    def is_available(self) -> bool:
        """Always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never found by itself: only `VERL_PLATFORM=cpu` chooses it."""
        return False

    def current_device(self) -> Any:
        """`cpu`: verl passes it to `Tensor.to`, where a number would mean a GPU."""
        return "cpu"

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing is pending."""

    def manual_seed(self, seed: int) -> None:
        """torch's generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """torch's generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Nothing to set."""

    def empty_cache(self) -> None:
        """Nothing to empty."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """None."""
        return None, None

    def communication_backend_name(self) -> str:
        """gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable that Ray sets for its resource GPU."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No ranges are recorded."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def ray_resource_name(self) -> str:
        """Ray's own accelerator resource, given out logically."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """None."""
        return []

    def is_ipc_supported(self) -> bool:
        """No device memory is shared."""
        return False

    def cudart(self) -> Any:
        """None."""


def register() -> None:
    """Make `VERL_PLATFORM=cpu` known to verl, and its process groups possible."""
    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )


def register_engine() -> None:
    """Keep the weights of a reference model where they are; they lie in the CPU's memory as it is."""
    from verl.workers.engine.fsdp import transformer_impl

    transformer_impl.CPUOffloadPolicy = _no_offload


def _no_offload(pin_memory: bool = True) -> None:
    """In the place of FSDP2's policy object: none."""
