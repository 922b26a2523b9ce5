"""AQN in a rollout process of verl: noise is drawn once for each weight sync, and removed while verl evaluates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn

from roundoff.aqn.noise import aqn_noise, aqn_targets
from roundoff.config import AQN, Phase
from roundoff.numerics.rng import Key


@dataclass(frozen=True, slots=True)
class Sync:
    """One weight sync, and the noise in the rollouts that follow it."""

    step: int
    """Training step, counted from 1, whose rollouts are made with these weights."""
    sigma: float
    """AQN's sigma in these rollouts; 0 without noise."""
    clean: str
    """Digest of AQN's target weights as they were synced."""
    noisy: str
    """Digest of the same weights with noise; equal to `clean` if sigma is 0."""


@dataclass
class AqnSwitch:
    """Noise on the norms of a rollout model.

    The weights are written between `before_sync` and `after_sync`. A draw depends on (seed, step, parameter) alone, so
    every rollout process draws the same noise, and restores the same bits after an evaluation.
    """

    model: nn.Module
    aqn: AQN | None
    """The noise; without AQN (None) the switch only records syncs."""
    key: Key
    """Key of the run's seed, from which draws are derived."""
    multipliers: Mapping[int, float] | None = None
    """Factors on sigma by decoder layer; None: 1 in every layer."""
    syncs: list[Sync] = field(default_factory=list)
    """All weight syncs so far."""
    evaluating: bool = False
    """Whether verl is evaluating, so that the noise is off."""
    _next: tuple[int, float] = (0, 0.0)
    _noise: ExitStack = field(default_factory=ExitStack)

    def announce(self, step: int, sigma: float) -> None:
        """Note the step and sigma of the rollouts that follow the next sync; called before each sync."""
        self._next = (step, sigma)

    def before_sync(self) -> None:
        """Remove the noise, so that clean weights are overwritten and no noise outlives its step."""
        self._noise.close()

    def after_sync(self) -> None:
        """Draw the noise for the weights just written and record the sync; during an evaluation it stays off."""
        step, sigma = self._next
        clean = self._digest()
        self._apply()
        noisy = self._digest()
        if self.evaluating:
            self._noise.close()
        self.syncs.append(Sync(step, sigma, clean, noisy))

    def evaluation(self, on: bool) -> None:
        """Begin (`on`) or end an evaluation: the weights are clean during it, and get the same noise again after it."""
        if on != self.evaluating:
            self._noise.close()
            self.evaluating = on
            if not on and self.syncs:
                self._apply()

    @property
    def phase(self) -> Phase:
        """The phase whose hardware answers requests at this moment."""
        return "evaluation" if self.evaluating else "rollout"

    @property
    def is_noisy(self) -> bool:
        """Whether AQN's noise is on the weights at this moment."""
        return bool(self.aqn is not None and self._next[1] and self.syncs and not self.evaluating)

    def _apply(self) -> None:
        step, sigma = self._next
        if self.aqn is not None and sigma:
            key = self.key.fold("aqn", step)
            self._noise.enter_context(aqn_noise(self.model, sigma, self.multipliers, key, self.aqn))

    def _digest(self) -> str:
        return digest(target.weight for target in aqn_targets(self.model, self.aqn)) if self.aqn is not None else ""


def digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen hex digits of a hash over the values of tensors, in order."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
