"""What is measured of AQN before the first step of a run, and what the settings warn of.

The layers that AQN spares or stresses are those of the session's SRDD scan, if `aqn.layers` refers to one.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from dataclasses import replace

import torch

from roundoff.aqn.noise import aqn_targets
from roundoff.aqn.preflight import ROUNDED_AWAY, Preflight, preflight, rounded_away
from roundoff.config import Experiment, Hardware, Profile, differences, hardware_in_words
from roundoff.errors import RoundoffWarning
from roundoff.models.calibration import calibration_texts
from roundoff.runs.directory import RunDirectory
from roundoff.runs.record import Status
from roundoff.training.session import Session


def measure_aqn(session: Session) -> Preflight | None:
    """What AQN does to the model before the first step, at the largest sigma of the run; None without AQN."""
    plan = session.aqn
    if plan.settings is None:
        return None
    sigma, step = list(plan.first_steps().items())[-1]
    return preflight(
        session.policy.loaded,
        calibration_texts(session.task),
        plan.settings,
        sigma,
        plan.at(step).multipliers,
        session.key.fold("aqn"),
    )


def rounding_warnings(session: Session) -> tuple[str, ...]:
    """A line where AQN's smaller sigmas do next to nothing, because the model's dtype rounds their noise away."""
    plan, settings = session.aqn, session.aqn.settings
    if settings is None:
        return ()
    if all(target.weight.dtype == torch.float32 for target in aqn_targets(session.model, settings)):
        return ()
    sigmas = list(plan.first_steps().items())  # ascending

    def is_lost(item: tuple[float, int]) -> bool:
        sigma, step = item
        key = session.key.fold("aqn", "rounding")
        return rounded_away(session.model, sigma, plan.at(step).multipliers, key, settings) > ROUNDED_AWAY

    lost = bisect_left(sigmas, True, key=lambda item: not is_lost(item))
    if not lost:
        return ()
    highest = sigmas[lost - 1][0]
    steps = sum(0 < sigma <= highest for sigma in plan.curve)
    return (
        f"AQN at sigma {highest:g} and below ({steps} of {sum(map(bool, plan.curve))} noisy steps) leaves "
        f"more than half of the weights as they are: {session.profile.dtype} rounds the noise away; raise "
        "aqn.sigma_end, or set profile.dtype = 'float32'",
    )


def phase_warnings(hardware: Hardware) -> tuple[str, ...]:
    """A line if the deployed score is taken on hardware that no rollout ever had."""
    rollout, evaluation = hardware.of("rollout"), hardware.of("evaluation")
    if rollout == evaluation:
        return ()
    if rollout.changes_nothing or evaluation.changes_nothing:
        differs = f"evaluation on {hardware_in_words(evaluation)}, rollouts on {hardware_in_words(rollout)}"
    else:
        differs = "; ".join(differences(evaluation, rollout, ("in evaluation", "in rollouts")))
    return (f"the deployed score is taken on hardware that no rollout had: {differs}",)


def correction_warnings(experiment: Experiment, profile: Profile) -> tuple[str, ...]:
    """A line if corrections by response are those by token, because every response has a single token."""
    correction = experiment.algorithm.correction
    if correction is None or profile.training.max_new_tokens > 1:
        return ()
    by_response = [name for name in (correction.rollout_is, *correction.rollout_rs) if name.startswith("seq")]
    if not by_response:
        return ()
    return (
        f"responses have one token (max_new_tokens = 1), so that {', '.join(by_response)} of algorithm.correction is "
        "the same as its form by token: it shows nothing about responses of more tokens",
    )


def measure_before(session: Session, run_dir: RunDirectory, status: Status) -> Status:
    """Keep the scan and AQN's pre-flight in the run's directory, and warn of what they show; before the first step."""
    notes = phase_warnings(session.experiment.hardware) + correction_warnings(session.experiment, session.profile)
    if session.scan is not None:
        run_dir.write_scan(session.scan.to_json())
        notes += session.scan.warnings()
    if (measured := measure_aqn(session)) is not None:
        run_dir.write_preflight(measured.to_json())
        notes += (*measured.warnings(), *rounding_warnings(session))
    for line in notes:
        warnings.warn(line, RoundoffWarning, stacklevel=2)
    return run_dir.set_status(replace(status, warnings=tuple(dict.fromkeys((*status.warnings, *notes)))))
