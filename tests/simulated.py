"""Outcomes and run directories drawn from a known model, for tests and benchmarks of statistics and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def solved(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


@dataclass(frozen=True)
class World:
    """Population that arms, seeds and problems are drawn from; standard deviations in logits."""

    mean: float = 0.7
    problem: float = 2.0
    """How far problems differ in difficulty, alike for both arms."""
    problem_by_arm: float = 0.4
    """How far an arm suits some problems and not others, alike for all its seeds."""
    seed: float = 0.1
    """How far seeds of one arm differ on the whole."""
    residual: float = 1.0
    """How far a seed suits some problems and not others."""

    def arm(self, rng: np.random.Generator, difficulty: Array, seeds: int, *, effect: float = 0.0) -> Array:
        """Outcomes `[S, P]` of 0 and 1 of one arm on problems of the given difficulty `[P]`."""
        problems = len(difficulty)
        logits = (
            self.mean
            + effect
            + difficulty
            + self.problem_by_arm * rng.standard_normal(problems)
            + self.seed * rng.standard_normal((seeds, 1))
            + self.residual * rng.standard_normal((seeds, problems))
        )
        return (rng.random((seeds, problems)) < solved(logits)).astype(float)

    def difficulty(self, rng: np.random.Generator, problems: int) -> Array:
        return self.problem * rng.standard_normal(problems)

    def score(self, effect: float = 0.0) -> float:
        """Expected accuracy over the whole population (Gauss-Hermite quadrature, exact to about 1e-9)."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        spread = np.sqrt(self.problem**2 + self.problem_by_arm**2 + self.seed**2 + self.residual**2)
        return float((weights * solved(self.mean + effect + spread * nodes)).sum() / weights.sum())


def repeat(count: int, seed: int, once: Callable[[np.random.Generator], bool]) -> float:
    """Share of `count` independent repeats in which `once` is true."""
    rng = np.random.default_rng(seed)
    return sum(once(rng) for _ in range(count)) / count
