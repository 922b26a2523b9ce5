"""AQN in a rollout process: drawn once for each weight sync, and taken off while verl evaluates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn

from roundoff.aqn.noise import aqn_noise, aqn_targets
from roundoff.config import AQN
from roundoff.numerics.rng import Key


@dataclass(frozen=True, slots=True)
class Sync:
    """One weight sync and the noise of the rollouts that follow it."""

    step: int
    """Training step, counted from 1, whose rollouts these weights make."""
    sigma: float
    """0: no noise."""
    clean: str
    """Digest of the target weights as they were synced."""
    noisy: str
    """Digest of the same weights under the noise; equal to `clean` where sigma is 0."""


@dataclass
class AqnSwitch:
    """Noise on the norms of a rollout model; without AQN (`aqn` None) it only records the syncs.

    Between `before_sync` and `after_sync` the weights are written. The draw depends on (seed, step, parameter) alone:
    every rollout process draws the same, and puts the same bits back after an evaluation.
    """

    model: nn.Module
    aqn: AQN | None
    key: Key
    multipliers: Mapping[int, float] | None = None
    """Factors on sigma by decoder layer."""
    syncs: list[Sync] = field(default_factory=list)
    evaluating: bool = False
    _next: tuple[int, float] = (0, 0.0)
    _noise: ExitStack = field(default_factory=ExitStack)

    def announce(self, step: int, sigma: float) -> None:
        """Step and sigma that the next sync is for."""
        self._next = (step, sigma)

    def before_sync(self) -> None:
        """Take the noise off, so that clean weights are overwritten and no noise outlives its step."""
        self._noise.close()

    def after_sync(self) -> None:
        """Draw the noise for the weights just written, unless an evaluation is going on."""
        step, sigma = self._next
        clean = self._digest()
        self._apply()
        noisy = self._digest()
        if self.evaluating:
            self._noise.close()
        self.syncs.append(Sync(step, sigma, clean, noisy))

    def evaluation(self, on: bool) -> None:
        """Begin or end an evaluation: clean weights inside, the same noise again afterwards."""
        if on != self.evaluating:
            self._noise.close()
            self.evaluating = on
            if not on and self.syncs:
                self._apply()

    @property
    def is_noisy(self) -> bool:
        """Whether AQN's noise is on the weights now."""
        return bool(self.aqn is not None and self._next[1] and self.syncs and not self.evaluating)

    def _apply(self) -> None:
        step, sigma = self._next
        if self.aqn is not None and sigma:
            key = self.key.fold("aqn", step)
            self._noise.enter_context(aqn_noise(self.model, sigma, self.multipliers, key, self.aqn))

    def _digest(self) -> str:
        return digest(target.weight for target in aqn_targets(self.model, self.aqn)) if self.aqn is not None else ""


def digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen hex digits over the bits of tensors, in order."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
