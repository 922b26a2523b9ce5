"""Sigma of AQN at every training step (QeRL, arXiv:2510.11696, section on adaptive quantization noise).

Steps count from 0, and the run is divided into intervals of equal length. Step `t` of `T` is in interval
`floor(t * intervals / T)`, computed in integers so that no boundary depends on rounding.

- `global`: `stages` intervals over the entire run. The first is silent; in the others sigma falls exponentially,
  `start * (end/start)^(j / (stages - 2))` for `j = 0 .. stages - 2`, from `sigma_start` to `sigma_end`.
- `epoch`: every epoch has a silent interval and then `stages` noisy ones. Epoch `e` of `E` covers its share of the
  decay on a logarithmic scale: from `start * (end/start)^(e/E)` to `start * (end/start)^((e+1)/E)`, both ends included.
  With `stages = 1` there is one value, the start of that share.
- `constant`: `sigma_start` at every step.
- `linear`, `cosine`: from `sigma_start` at step 0 to `sigma_end` at the last step.

For example, `global` with sigma 0.1 to 0.001, 4 stages and 8 steps gives `0 0 .1 .1 .01 .01 .001 .001`. The three
schedules without a silent interval are our own, for ablations. This module does not import torch.
"""

from __future__ import annotations

import math

from roundoff.config import AQN, ConfigError


def aqn_sigma(step: int, total_steps: int, steps_per_epoch: int, aqn: AQN) -> float:
    """Sigma of AQN at a step: a standard deviation, relative to the weight if `aqn.noise` is `relative`.

    `step` counts from 0 to `total_steps - 1`. If a run ends within an epoch, that epoch counts as a full one.

    Raises:
        ValueError: if a count is below 1, or the run has no such step.
    """
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"total_steps ({total_steps}) and steps_per_epoch ({steps_per_epoch}) must be at least 1")
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be in [0, {total_steps}), but is {step}: steps count from 0")
    start, end = aqn.sigma_start, aqn.sigma_end
    progress = step / (total_steps - 1) if total_steps > 1 else 0.0
    match aqn.schedule:
        case "constant":
            return start
        case "linear":
            return start + (end - start) * progress
        case "cosine":
            return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0
        case "global":
            interval = step * aqn.stages // total_steps
            return 0.0 if interval == 0 else _decayed(start, end, interval - 1, aqn.stages - 1)
        case "epoch":
            epochs = -(-total_steps // steps_per_epoch)
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            interval = step_of_epoch * (aqn.stages + 1) // steps_per_epoch
            if interval == 0:
                return 0.0
            first = start * (end / start) ** (epoch / epochs)
            last = start * (end / start) ** ((epoch + 1) / epochs)
            return _decayed(first, last, interval - 1, aqn.stages)


def _decayed(start: float, end: float, index: int, count: int) -> float:
    """Value number `index` of `count` on the exponential from `start` to `end`, both included."""
    return start if count == 1 else start * (end / start) ** (index / (count - 1))


def sigma_curve(total_steps: int, steps_per_epoch: int, aqn: AQN) -> list[float]:
    """Sigma at each of the `total_steps` steps of a run.

    Raises:
        ConfigError: if sigma is 0 throughout, so that AQN would silently do nothing.
    """
    curve = [aqn_sigma(step, total_steps, steps_per_epoch, aqn) for step in range(total_steps)]
    if not any(curve):
        raise ConfigError(
            f"aqn would never inject noise: schedule {aqn.schedule!r} with stages = {aqn.stages} starts silent and "
            f"{total_steps} steps ({steps_per_epoch} per epoch) never leave the silent interval; "
            "train for more steps, or set aqn.schedule = 'constant'"
        )
    return curve
