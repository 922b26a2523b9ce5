"""How the log of an importance weight spreads as responses get longer, and the length at which too few samples count.

After t tokens a response has the log weight S_t, the sum of t log ratios. If differences of tokens are like independent
draws, Var(S_t) = v*t. For a normal S_t the effective sample size of the weights exp(S_t) is then exp(-v*t), as a share
of the samples (log-normal moments: E[w]^2 / E[w^2]), and it falls to one half at t = ln(2)/v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from roundoff.stats.intervals import LEVEL

Array = NDArray[np.float64]
FEWEST = 30
"""Fewest responses from which a variance after t tokens is taken."""
FEWEST_LENGTHS = 6
"""Fewest lengths through which a line is laid."""
FARTHEST = 100.0
"""A length is extrapolated to at most this multiple of the longest one measured."""
ROUNDING = 1e-8
"""Variances a token below this (nats^2) are rounding of float32 log-probabilities."""


@dataclass(frozen=True, slots=True)
class Growth:
    """The fit `Var(S_t) = v*t`, with 95 % intervals over prompts, or why there is none."""

    longest: int
    """Longest t that enough responses reach (tokens)."""
    rate: tuple[float, float, float] | None
    """Estimate of v and its interval (nats^2 per token)."""
    exponent: tuple[float, float, float] | None
    """Exponent b of a free fit `Var(S_t) = a * t^b`; the line is supported if its interval holds 1."""
    length: tuple[float, float, float] | None
    """Length at which the effective sample size is one half, and its interval (tokens)."""
    refusal: str
    """Why no length is extrapolated; empty where one is."""


def weight_growth(
    prefix: Float64[Array, "responses tokens"],
    lengths: Int64[NDArray[np.int64], " responses"],
    counts: Float64[Array, "resamples responses"],
) -> Growth:
    """Fit the growth of the variance.

    Args:
        prefix: log weight of each response after 1, 2, ... tokens; values beyond its length have no influence.
        lengths: number of tokens of each response.
        counts: how often each response is in each resample of the prompts.
    """
    reached = np.arange(1, prefix.shape[1] + 1) <= lengths[:, None]
    t = np.arange(1, prefix.shape[1] + 1)[reached.sum(axis=0) >= FEWEST]
    longest = int(t[-1]) if len(t) else 0
    if len(t) < FEWEST_LENGTHS:
        few = f"only lengths up to {longest} have {FEWEST} responses, and a line needs {FEWEST_LENGTHS} of them"
        return Growth(longest, None, None, None, few)
    inside = reached[:, : len(t)].astype(np.float64)
    values = np.where(reached[:, : len(t)], prefix[:, : len(t)], 0.0)
    if not np.isfinite(values).all():
        return Growth(longest, None, None, None, "a token of a rollout has probability 0 in training")
    values = values - (values.sum(axis=0) / inside.sum(axis=0)) * inside  # so that squares do not cancel
    whole = np.ones((1, len(lengths)))
    rates, exponents = _fits(values, inside, np.concatenate([whole, counts]), t.astype(np.float64))
    if not rates[0] > ROUNDING:
        return Growth(longest, None, None, None, "the difference is at the level of rounding")
    rate, exponent = _interval(rates), _interval(exponents)
    if not exponent[1] <= 1 <= exponent[2]:
        how = f"as length^{exponent[0]:.2f} [{exponent[1]:.2f}, {exponent[2]:.2f}]"
        return Growth(longest, rate, exponent, None, f"the variance does not grow in proportion to length, but {how}")
    length = (math.log(2) / rate[0], math.log(2) / rate[2], math.log(2) / rate[1])
    if length[0] <= longest:
        return Growth(longest, rate, exponent, None, f"one half is passed within the {longest} tokens measured")
    if length[0] > FARTHEST * longest:
        far = f"it lies beyond {FARTHEST:.0f} times the {longest} tokens measured"
        return Growth(longest, rate, exponent, None, far)
    return Growth(longest, rate, exponent, length, "")


def _fits(values: Array, inside: Array, counts: Array, t: Array) -> tuple[Array, Array]:
    """Rate and exponent in each resample; a length weighs as the number of responses that reach it."""
    n = np.maximum(counts @ inside, 1.0)
    variance = np.maximum((counts @ values**2) / n - ((counts @ values) / n) ** 2, np.finfo(np.float64).tiny)
    rate = (n * variance / t).sum(axis=1) / n.sum(axis=1)
    x, y = np.log(t), np.log(variance)
    centred = x - (n * x).sum(axis=1, keepdims=True) / n.sum(axis=1, keepdims=True)
    return rate, (n * centred * y).sum(axis=1) / (n * centred * centred).sum(axis=1)


def _interval(values: Array) -> tuple[float, float, float]:
    """The first value, and the percentiles of the others that hold 95 % of them."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values[0]), float(low), float(high)
