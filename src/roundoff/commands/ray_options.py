"""Options of `roundoff run` and `sweep` that send runs to a Ray cluster."""

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
    click.option(
        "--cpus-per-run",
        type=click.FloatRange(min=0, min_open=True),
        help="CPUs that Ray reserves for a run. [default: the profile's threads]",
    ),
    click.option("--gpus-per-run", type=click.FloatRange(min=0), help="GPUs that Ray reserves for a run. [default: 0]"),
    click.option(
        "--ray-retries",
        type=click.IntRange(min=0),
        help="How often a run is sent again after its worker or node died. [default: 3]",
    ),
    click.option(
        "--ray-sync", is_flag=True, help="Send the runs' files back to this node, if the nodes share no directory."
    ),
)


def with_ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with Ray's options added; it receives them as one argument `ray`, which is None without --ray."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        ray = _take(options)
        command(*arguments, **options, ray=ray)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _take(options: dict[str, Any]) -> RayOptions | None:
    """Remove Ray's options from all options and return them; None without --ray.

    Raises:
        ConfigError: if another of Ray's options is given without --ray.
    """
    from roundoff.launch.ray.cluster import RayOptions

    values = {name: options.pop(name) for name in ("cpus_per_run", "gpus_per_run", "ray_retries", "ray_sync")}
    address = options.pop("ray_address")
    idle = [f"--{name.replace('_', '-')}" for name, value in values.items() if value not in (None, False)]
    if address is None and idle:
        raise ConfigError(f"{', '.join(idle)} {'do' if len(idle) > 1 else 'does'} nothing without --ray")
    if address is None:
        return None
    return RayOptions(
        address=address,
        cpus_per_run=values["cpus_per_run"],
        gpus_per_run=values["gpus_per_run"] or 0.0,
        retries=3 if values["ray_retries"] is None else values["ray_retries"],
        sync=values["ray_sync"],
    )
