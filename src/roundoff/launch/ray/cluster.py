"""A connection to a Ray cluster: it is refused within seconds if no cluster answers, and closed at the end.

Ray's usage statistics are off, and a cluster that is started here has no dashboard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from roundoff.config import ConfigError
from roundoff.optional_packages import require

ANSWER_WAIT_S = 3.0
"""Seconds within which the head node of a cluster must answer."""
LOCAL, AUTO = "local", "auto"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """The cluster that makes the runs, and the resources that each run takes."""

    address: str = LOCAL
    """`local` (a cluster started on this machine for these runs), `auto` (one that already runs here), or HOST:PORT."""
    cpus_per_run: float | None = None
    """CPUs that Ray reserves for a run; None: the profile's threads."""
    gpus_per_run: float = 0.0
    """GPUs that Ray reserves for a run."""
    retries: int = 3
    """How often a run is sent again after its worker or node died."""
    sync: bool = False
    """Whether workers write to disks of their own and send the files back; otherwise all share one directory."""


def check_address(address: str) -> None:
    """Refuse within a few seconds an address that is malformed or does not answer.

    Raises:
        ConfigError: saying what to do.
    """
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ConfigError(
            f"--ray must be local, auto or HOST:PORT, but is {address!r} (before a NAME write --ray local; for "
            "ray://, start roundoff on a node of the cluster instead, with --ray auto)"
        )
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        # the standard health service of gRPC; an empty message asks for the server as a whole
        ask = channel.unary_unary("/grpc.health.v1.Health/Check", lambda m: m, lambda m: m)
        try:
            ask(b"", timeout=ANSWER_WAIT_S)
        except grpc.RpcError as error:
            raise ConfigError(
                f"--ray {address} does not answer within {ANSWER_WAIT_S:.0f} s ({error.code().name.lower()}): is a Ray "
                "head node running there (`ray start --head` prints its address)?"
            ) from None


@contextmanager
def connected(options: RayOptions, workers: int) -> Iterator[ModuleType]:
    """The module `ray`, connected inside the block; a cluster that is started here has room for `workers` runs.

    Raises:
        ConfigError: if Ray is not installed, or no cluster answers.
    """
    ray = require("ray", "ray")
    check_address(options.address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads this when it starts
    settings: dict[str, Any] = {"address": options.address, "log_to_driver": False}
    if options.address == LOCAL:
        settings |= {"num_cpus": math.ceil(workers * (options.cpus_per_run or 1)), "include_dashboard": False}
    try:
        ray.init(**settings, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray {options.address}: {first}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def missing_resource(ray: ModuleType, cpus: float, gpus: float) -> str | None:
    """What one run needs that no single node of the cluster has, in words; None if some node has it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return None
    needed = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    largest: dict[str, float] = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
    return f"{needed} for a run (the largest has {largest.get('CPU', 0):g} CPU and {largest.get('GPU', 0):g} GPU)"
