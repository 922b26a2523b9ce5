"""What `roundoff show` prints: resolved settings, the layers that the hardware touches, AQN's sigma step by step."""

from __future__ import annotations

from itertools import groupby

import tomli_w

from roundoff.config import Experiment, Profile, result_hash

BAR = 30
"""Width of the longest bar of the sigma curve (characters)."""


def settings(experiment: Experiment, profile: Profile) -> str:
    """Every setting in force, as TOML, headed by the name of the run directory."""
    content = {
        "experiment": experiment.model_dump(mode="json", exclude_none=True),
        "profile": profile.model_dump(mode="json", exclude_none=True),
    }
    head = f"# runs/{experiment.id}/{profile.name}-{result_hash(experiment, profile)}/seed-<n>\n"
    return head + tomli_w.dumps(content)


def layers(experiment: Experiment, profile: Profile) -> str:
    """Where the hardware is installed, and what is left alone and why. Loads the model; trains nothing."""
    import torch

    from roundoff.hardware.install import install
    from roundoff.models.load import load_model

    if experiment.hardware.changes_nothing:
        return "# hardware: plain arithmetic, no layer is touched\n"
    model = load_model(profile.model, dtype=getattr(torch, profile.dtype)).model
    return install(model, experiment.hardware, seed=0).summary()


def sigma(experiment: Experiment, profile: Profile) -> str:
    """AQN's sigma over the run, one line for each interval of equal value."""
    from roundoff import session
    from roundoff.algorithms.schedule import sigma_curve

    if experiment.aqn is None:
        return "# aqn: none\n"
    problems = len(session.make_task(profile).train())
    per_epoch = session.steps_per_epoch(problems, experiment.algorithm, profile.training)
    total = experiment.epochs * per_epoch
    lines = [f"# aqn: sigma of {total} steps, {per_epoch} an epoch"]
    step = 0
    for value, group in groupby(sigma_curve(total, per_epoch, experiment.aqn)):
        count = len(list(group))
        bar = "#" * round(BAR * value / experiment.aqn.sigma_start)
        lines.append(f"steps {step + 1:>4} to {step + count:>4}  {value:<10.4g} {bar}".rstrip())
        step += count
    return "\n".join(lines) + "\n"
