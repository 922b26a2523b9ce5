"""A run's remedies at work: AQN in the rollouts of each step, and what is measured of it before the first.

The layers that AQN spares or stresses are those of the session's SRDD scan, if `aqn.layers` refers to one.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from roundoff.aqn.noise import aqn_noise, aqn_targets
from roundoff.aqn.preflight import ROUNDED_AWAY, Preflight, preflight, rounded_away
from roundoff.errors import RoundoffWarning
from roundoff.models.calibration import calibration_texts
from roundoff.runs.directory import RunDirectory
from roundoff.runs.record import Status
from roundoff.training.session import Session


def aqn_of_step(session: Session, step: int) -> AbstractContextManager[None]:
    """AQN in force on the model inside, as a step (numbered from 1) wants it; nothing at silent steps."""
    aqn, sigma = session.experiment.aqn, session.sigmas[step - 1]
    if aqn is None or not sigma:
        return nullcontext()
    return aqn_noise(session.model, sigma, session.multipliers(step), session.key.fold("aqn", step), aqn)


def layer_sigmas(session: Session, step: int) -> dict[str, list[float]]:
    """What to log: AQN's true sigma of each decoder layer, where they differ (all else has the step's sigma)."""
    multipliers = session.multipliers(step)
    if multipliers is None:
        return {}
    return {"sigma_layers": [session.sigmas[step - 1] * factor for _, factor in sorted(multipliers.items())]}


def measure_aqn(session: Session) -> Preflight | None:
    """What AQN does to the model before the first step, at the largest sigma of the run; None without AQN."""
    if session.experiment.aqn is None:
        return None
    sigma = max(session.sigmas)
    return preflight(
        session.policy.loaded,
        calibration_texts(session.task),
        session.experiment.aqn,
        sigma,
        session.multipliers(session.sigmas.index(sigma) + 1),
        session.key.fold("aqn"),
    )


def rounding_warnings(session: Session) -> tuple[str, ...]:
    """A line where AQN's smaller sigmas do next to nothing, as the model's dtype rounds their noise away."""
    aqn = session.experiment.aqn
    noisy = sorted({sigma for sigma in session.sigmas if sigma})
    if aqn is None or all(target.weight.dtype == torch.float32 for target in aqn_targets(session.model, aqn)):
        return ()

    def is_lost(sigma: float) -> bool:
        factors = session.multipliers(session.sigmas.index(sigma) + 1)
        return rounded_away(session.model, sigma, factors, session.key.fold("aqn", "rounding"), aqn) > ROUNDED_AWAY

    lost = bisect_left(noisy, True, key=lambda sigma: not is_lost(sigma))
    if not lost:
        return ()
    steps = sum(0 < sigma <= noisy[lost - 1] for sigma in session.sigmas)
    return (
        f"AQN at sigma {noisy[lost - 1]:g} and below ({steps} of {sum(map(bool, session.sigmas))} noisy steps) leaves "
        f"more than half of the weights as they are: {session.profile.dtype} rounds the noise away; raise "
        "aqn.sigma_end, or set profile.dtype = 'float32'",
    )


def measure_before(session: Session, run_dir: RunDirectory, status: Status) -> Status:
    """Keep the scan and AQN's pre-flight in the run's directory, and warn of what they show."""
    said: tuple[str, ...] = ()
    if session.scan is not None:
        run_dir.write_scan(session.scan.to_json())
        said += session.scan.warnings()
    if (measured := measure_aqn(session)) is not None:
        run_dir.write_preflight(measured.to_json())
        said += (*measured.warnings(), *rounding_warnings(session))
    for line in said:
        warnings.warn(line, RoundoffWarning, stacklevel=5)
    return run_dir.set_status(replace(status, warnings=tuple(dict.fromkeys((*status.warnings, *said)))))
