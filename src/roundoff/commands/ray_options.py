"""Options of `roundoff run` that send runs to a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from roundoff.config import ConfigError

if TYPE_CHECKING:
    from roundoff.launch.ray.cluster import RayOptions

_OPTIONS = (
    click.option(
        "--ray",
        "ray_address",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Make the runs on a Ray cluster: local (one on this machine), auto (the one running here), or HOST:PORT.",
    ),
    click.option("--cpus-per-run", type=click.FloatRange(min=0, min_open=True), help="With --ray. [default: threads]"),
    click.option("--gpus-per-run", type=click.FloatRange(min=0), help="With --ray. [default: 0]"),
    click.option(
        "--ray-retries",
        type=click.IntRange(min=0),
        help="How often a run goes on elsewhere after its worker or node died. [default: 3]",
    ),
    click.option("--ray-sync", is_flag=True, help="Nodes share no directory: send the runs' files back to this one."),
)


def with_ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with Ray's options, given to it as one argument `ray` (None: without Ray)."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        ray = _take(options)
        command(*arguments, **options, ray=ray)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _take(options: dict[str, Any]) -> RayOptions | None:
    """Ray's options, removed from all options.

    Raises:
        ConfigError: if one is given that does nothing without --ray.
    """
    from roundoff.launch.ray.cluster import RayOptions

    given = {name: options.pop(name) for name in ("cpus_per_run", "gpus_per_run", "ray_retries", "ray_sync")}
    address = options.pop("ray_address")
    idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]
    if address is None and idle:
        raise ConfigError(f"{', '.join(idle)} does nothing without --ray")
    if address is None:
        return None
    return RayOptions(
        address=address,
        cpus_per_run=given["cpus_per_run"],
        gpus_per_run=given["gpus_per_run"] or 0.0,
        retries=3 if given["ray_retries"] is None else given["ray_retries"],
        sync=given["ray_sync"],
    )
