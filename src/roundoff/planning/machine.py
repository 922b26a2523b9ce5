"""How fast a device is and how much it holds, from data sheets or measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from roundoff.config import ConfigError, nearest

if TYPE_CHECKING:
    import torch

REPEATS = 7
"""Times that each measurement is repeated; the fastest counts."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One device of a run. Its rates are those that large operations reach, not the peaks of a data sheet."""

    name: str
    float32: float
    """Rate of matrix products in float32 (FLOP/s)."""
    bfloat16: float
    """Rate of matrix products in bfloat16 (FLOP/s)."""
    bandwidth: float
    """Rate of memory traffic (bytes/s)."""
    memory: float
    """Memory that a run can use (bytes)."""
    operation: float
    """Time to issue one operation of the eager model, including its share of Python (s)."""
    is_asynchronous: bool
    """Whether operations are issued while earlier ones still compute, as on an accelerator."""
    compiled: bool
    """Whether roundoff's compiled kernels run on it; otherwise the plain torch path is used."""
    interconnect: float = 0.0
    """Rate of an all-reduce between devices (bytes/s)."""
    source: str = ""
    """Where the figures come from, in words."""

    def rate(self, dtype: str) -> float:
        """Rate of matrix products in this dtype (FLOP/s)."""
        return self.float32 if dtype == "float32" else self.bfloat16


ATTAINED_FLOPS, ATTAINED_BANDWIDTH = 0.6, 0.75
"""Shares of a data sheet's peak that large products and large copies are assumed to reach."""
ISSUE_S = 20e-6
"""Time to issue one operation that is assumed for accelerators (s). On a server's CPU, `transformers` needs about
0.6 ms to decode one token through a layer of 32 operations."""


def _sheet(name: str, float32: float, bfloat16: float, bandwidth: float, memory: float, link: float) -> Machine:
    return Machine(
        name=name,
        float32=ATTAINED_FLOPS * float32,
        bfloat16=ATTAINED_FLOPS * bfloat16,
        bandwidth=ATTAINED_BANDWIDTH * bandwidth,
        memory=memory,
        operation=ISSUE_S,
        is_asynchronous=True,
        compiled=False,
        interconnect=ATTAINED_BANDWIDTH * link / 2,  # an all-reduce sends every byte about twice
        source=f"data sheet: {float32 / 1e12:g} TFLOP/s float32 without TF32, {bfloat16 / 1e12:g} bfloat16, "
        f"{bandwidth / 1e12:g} TB/s, of which {ATTAINED_FLOPS:g} and {ATTAINED_BANDWIDTH:g} are taken to be reached; "
        f"{ISSUE_S * 1e6:g} µs to issue an operation",
    )


MACHINES = {
    machine.name: machine
    for machine in (
        _sheet("a100-80gb", 19.5e12, 312e12, 2.04e12, 80e9, 300e9),
        _sheet("h100-80gb", 67e12, 989e12, 3.35e12, 80e9, 450e9),
        _sheet("h200-141gb", 67e12, 989e12, 4.8e12, 141e9, 450e9),
    )
}
"""Accelerators by name (from NVIDIA's data sheets of the SXM boards; dense rates)."""
HERE = "here"
"""The name that stands for the machine this runs on."""


def find_machine(name: str) -> Machine:
    """The machine of this name in `MACHINES`; for `here`, this machine, which is measured in a few seconds.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name == HERE:
        return measure_machine()
    if name not in MACHINES:
        known = (HERE, *MACHINES)
        raise ConfigError(f"--machine must be one of {', '.join(known)}, but is {name!r}{nearest(name, known)}")
    return MACHINES[name]


def measure_machine(device: str = "auto", threads: int = 1) -> Machine:
    """This machine, from the times of a large product, a large copy, and the embedded model's decoding step.

    That step computes next to nothing, so it takes as long as issuing its operations does. On a CPU with one thread,
    the clock counts only the time that this thread spends computing, so other work on the machine does not distort it.

    Args:
        device: the device, named as in a profile.
        threads: number of CPU threads of a run.
    """
    import torch

    from roundoff.models.device import resolve_device
    from roundoff.numerics.backend import computed_by

    place = torch.device(resolve_device(device))
    clock = _clock(place, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = 1024 if place.type == "cpu" else 4096
        rates = []
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(size, size, device=place).to(dtype)
            rates.append(2 * size**3 / clock(lambda a=a: a @ a))  # type: ignore[misc]
        source = torch.randn(2**24, device=place)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / clock(lambda: target.copy_(source))
        issue = _issue_time(place, clock)
        compiled = computed_by(source) != "torch"
    finally:
        torch.set_num_threads(before)
    return Machine(
        name=HERE,
        float32=rates[0],
        bfloat16=rates[1],
        bandwidth=copied,
        memory=_memory(place),
        operation=issue,
        is_asynchronous=place.type != "cpu",
        compiled=compiled,
        source=f"measured on {place} with {threads} thread{'s' if threads > 1 else ''}: {rates[0] / 1e9:.0f} GFLOP/s "
        f"float32, {rates[1] / 1e9:.0f} bfloat16, {copied / 1e9:.1f} GB/s, {issue * 1e6:.0f} µs to issue an operation",
    )


def _clock(place: torch.device, threads: int) -> Callable[[Callable[[], object]], float]:
    """A function that returns the seconds which an action takes: the fastest of `REPEATS` times."""
    import torch

    now = time.thread_time if place.type == "cpu" and threads == 1 else time.perf_counter

    def seconds(action: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(REPEATS):
            began = now()
            action()
            if place.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, now() - began)
        return best

    return seconds


def _issue_time(place: torch.device, clock: Callable[[Callable[[], object]], float]) -> float:
    """Time to issue one operation (s), from the embedded model's decoding step on a single row."""
    import torch

    from roundoff.models.load import load_model
    from roundoff.planning.work import FIXED_OPERATIONS, PLAIN

    loaded = load_model("tiny", device=place)
    layers = loaded.model.config.num_hidden_layers
    token = torch.zeros(1, 1, dtype=torch.int64, device=place)
    with torch.inference_mode():

        def step() -> None:
            for _ in range(5):
                loaded.model(input_ids=token, use_cache=False, logits_to_keep=1)

        seconds: float = clock(step) / 5 / (layers * PLAIN.forward.operations + FIXED_OPERATIONS)
        return seconds


def _memory(place: torch.device) -> float:
    """Memory of the device (bytes); 0 where it cannot be told."""
    import torch

    if place.type == "cuda":
        return float(torch.cuda.get_device_properties(place).total_memory)
    if place.type == "cpu":
        import os

        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 0.0


def with_limits(machine: Machine, *, memory_gb: float | None) -> Machine:
    """The machine with `memory_gb` of memory (GB), or unchanged if that is None."""
    return machine if memory_gb is None else replace(machine, memory=memory_gb * 1e9)
