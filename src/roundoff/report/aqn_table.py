"""AQN in an arm: its settings, and the sigma and the multipliers that its steps recorded."""

from __future__ import annotations

from dataclasses import dataclass

from roundoff.config import SRDD
from roundoff.report.arms import Arm
from roundoff.runs.outcomes import DamagedRunError


@dataclass(frozen=True)
class AqnRow:
    """AQN's configuration in one arm, and the noise that was injected."""

    sigma_start: float
    sigma_end: float
    schedule: str
    stages: int
    target: str
    noise: str
    layers: str
    """The layers that get noise: all, or a mode of the SRDD scan."""
    metric: str
    """Metric and direction of the scan; empty if all layers are treated alike."""
    noisy_steps: int
    """Number of steps so far whose rollouts had noise."""
    steps: int
    """Number of steps so far."""
    highest: float
    """Largest sigma that a step recorded."""
    lowest: float
    """Smallest sigma above zero that a step recorded."""
    kl: float | None
    """KL that the largest sigma alone caused before training (nats per token); None if it was not measured."""
    hardware_kl: float | None
    """KL that the hardware alone caused before training (nats per token); None if it was not measured."""
    multipliers: tuple[float, ...]
    """Factor on sigma for each decoder layer at the first noisy step; empty if all are 1."""


def aqn_row(arm: Arm) -> AqnRow | None:
    """AQN in an arm, from its settings and the metrics of its first run; None for an arm without AQN."""
    aqn = arm.experiment.aqn
    if aqn is None:
        return None
    rows = [row for row in arm.runs[0].metrics if row.get("sigma") is not None]
    noisy = [row for row in rows if row["sigma"] > 0]
    sigmas = [float(row["sigma"]) for row in noisy]
    first = noisy[0] if noisy else {}
    preflight = _preflight(arm)
    scan = arm.experiment.srdd or SRDD()
    return AqnRow(
        sigma_start=aqn.sigma_start,
        sigma_end=aqn.sigma_end,
        schedule=aqn.schedule,
        stages=aqn.stages,
        target=aqn.target,
        noise=aqn.noise,
        layers=aqn.layers,
        metric="" if aqn.layers == "all" else f"{scan.metric}, {scan.direction} end",
        noisy_steps=len(noisy),
        steps=len(rows),
        highest=max(sigmas, default=0.0),
        lowest=min(sigmas, default=0.0),
        kl=preflight.get("kl"),
        hardware_kl=preflight.get("hardware_kl"),
        multipliers=tuple(float(s) / float(first["sigma"]) for s in first.get("sigma_layers", ())),
    )


def _preflight(arm: Arm) -> dict[str, float]:
    """Results of the first run's preflight check; empty if there are none that can be read."""
    try:
        results = arm.runs[0].preflight or {}
    except DamagedRunError:
        return {}
    return {name: float(results[name]) for name in ("kl", "hardware_kl") if isinstance(results.get(name), int | float)}
