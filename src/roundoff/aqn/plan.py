"""AQN over a whole run: the sigma of each step, and its multiplier in each decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from roundoff.aqn.noise import aqn_noise, check_multipliers
from roundoff.config import AQN
from roundoff.numerics.rng import Key

Multipliers = Mapping[int, float]
"""The factor on sigma of each decoder layer, by the layer's index."""


@dataclass(frozen=True, slots=True)
class StepNoise:
    """What AQN does in the rollouts of one step."""

    sigma: float
    """Standard deviation of the noise, 0 at a silent step; its unit is that of `aqn.noise`."""
    multipliers: Multipliers | None
    """None where every layer has the same sigma."""

    def by_layer(self) -> list[float] | None:
        """Sigma of each decoder layer, in their order; None where every layer has the same."""
        if self.multipliers is None:
            return None
        return [self.sigma * factor for _, factor in sorted(self.multipliers.items())]


@dataclass(frozen=True, slots=True)
class AqnPlan:
    """AQN's noise at every step of a run. Steps are numbered from 1."""

    settings: AQN | None
    """None for a run without AQN."""
    curve: tuple[float, ...]
    """Sigma of each step."""
    multipliers: tuple[Multipliers | None, ...]
    """The multipliers of each step."""

    @classmethod
    def silent(cls, total_steps: int) -> AqnPlan:
        """The plan of a run without AQN."""
        return cls(None, (0.0,) * total_steps, (None,) * total_steps)

    def at(self, step: int) -> StepNoise:
        """What AQN does at a step."""
        return StepNoise(self.curve[step - 1], self.multipliers[step - 1])

    def in_force(self, model: nn.Module, step: int, key: Key) -> AbstractContextManager[None]:
        """The noise of a step on the model's weights inside the block; nothing at a silent step.

        Args:
            model: whose weights are perturbed, and restored bit for bit afterwards.
            step: numbered from 1.
            key: of the run; each step draws noise of its own.
        """
        noise = self.at(step)
        if self.settings is None or not noise.sigma:
            return nullcontext()
        return aqn_noise(model, noise.sigma, noise.multipliers, key.fold("aqn", step), self.settings)

    def first_steps(self) -> dict[float, int]:
        """The first step at which each sigma above 0 is in force, by ascending sigma."""
        steps: dict[float, int] = {}
        for step, sigma in enumerate(self.curve, start=1):
            if sigma:
                steps.setdefault(sigma, step)
        return dict(sorted(steps.items()))

    def check(self, model: nn.Module) -> None:
        """Check the multipliers of the first and the last step against the layers of a model.

        Raises:
            ConfigError: if a layer has no multiplier, or a multiplier has no layer.
        """
        if self.settings is not None:
            for multipliers in (self.multipliers[0], self.multipliers[-1]):
                check_multipliers(model, self.settings, multipliers)
