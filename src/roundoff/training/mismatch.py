"""How far the log-probabilities of a training pass lie from those that the rollouts were sampled from.

A response token y has log-probability `mu(y)` in the rollout and `pi(y)` in the training pass; both are in nats, at the
temperature of sampling. With `d = pi(y) - mu(y)` the importance weight of a token is `exp(d)`, and that of a response
is `exp(s)`, where s is the sum of its d. Responses are samples of the rollout's policy, so a mean over them estimates
an expectation under mu:

    mean, p99, max      of |d| over tokens
    kl                  mean of -d                       KL(rollout || training) by k1; unbiased, may be negative
    k3_kl               mean of exp(d) - 1 - d           the same by k3; never negative
    kl_reverse          mean of exp(d)*d                 KL(training || rollout) by k1, weighted to the training policy
    k3_kl_reverse       mean of exp(d)*d - exp(d) + 1    the same by k3; never negative
    training_ppl        mean over responses of exp(-mean of pi);   rollout_ppl: the same of mu
    ppl_ratio           mean over responses of exp(-mean of d)
    chi2_token          mean of exp(d)^2, less 1;         chi2_seq: mean of exp(s)^2, less 1
    ess_token           (sum of exp(d))^2 / (k * sum of exp(d)^2) over k tokens;   ess_seq: of exp(s) over responses
    cut_token, cut_seq  share of the weights exp(d), exp(s) that lie above a cap

Sources: k1 and k3 are those of Schulman 2020 (joschu.net/blog/kl-approx.html), who gives the k3 of both directions. The
definitions of `kl`, `k3_kl`, the perplexities, `ppl_ratio` and both chi-squares are those of verl 0.9.1
(`compute_offpolicy_metrics` in `rollout_corr_helper.py`), which logs them as `rollout_corr/<name>`. As in verl, the log
weights of chi-square and of tokens are clamped to +-20. The effective sample size is Kish's (1965), which verl logs as
`rollout_is_eff_sample_size`. That of responses is computed from logarithms and clamps nothing, since a clamp would make
equal, and so seemingly perfect, weights of those of long responses.

Everything is float64 in host memory. With k tokens the cost is a few passes over k numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from roundoff.parallel.ranks import Ranks
from roundoff.sampling.rollouts import Rollouts
from roundoff.training.loss import LOG_RATIO_LIMIT

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PREFIX = "mismatch_"
"""What the names of a row of `metrics.jsonl` begin with."""
BY_LENGTH = ("k3_kl", "ess_seq")
"""Measures that a row holds by response length, too."""
P99 = 0.99
COLUMNS = (
    *("tokens", "mean", "kl", "k3_kl", "kl_reverse", "k3_kl_reverse", "rho", "rho_squared", "cut_token"),
    *("responses", "training_ppl", "rollout_ppl", "ppl_ratio", "rho_squared_seq", "cut_seq"),
)
"""Sums of a response that the measures are made of: over its tokens, then values of the response itself."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Log-probabilities of the same m responses, k tokens in all, in a rollout and in a training pass; none is empty.

    The tokens of a response are consecutive, so nothing is padded.
    """

    log_ratio: Float64[Floats, " tokens"]
    """Training less rollout (nats)."""
    rollout: Float64[Floats, " tokens"]
    """Log-probability in the rollout (nats)."""
    lengths: Int64[Integers, " responses"]
    """Number of tokens of each response, at least 1."""

    @classmethod
    def of(cls, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Difference:
        """The difference in one or more batches, each [n, t]: rollout's and training's log-probabilities, and the mask.

        All are in host memory. Values outside the mask, NaN included, have no influence, and neither have responses
        without a token.

        Raises:
            ValueError: if the three shapes of a batch differ, or there is no token at all.
        """
        rollout, training, lengths = [], [], []
        for sampled, passed, mask in parts:
            if not sampled.shape == passed.shape == mask.shape or mask.ndim != 2:
                shapes = [list(x.shape) for x in (sampled, passed, mask)]
                raise ValueError(f"rollout, training and mask must be of one shape [n, t], but are {shapes}")
            inside = mask.bool()
            rollout.append(sampled.detach()[inside].to(torch.float64).numpy())
            training.append(passed.detach()[inside].to(torch.float64).numpy())
            lengths.append(inside.sum(dim=1).numpy())
        counts = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        if not counts.sum():
            raise ValueError("a difference needs at least one response token")
        before = np.concatenate(rollout)
        with np.errstate(invalid="ignore"):
            return cls(np.concatenate(training) - before, before, counts[counts > 0])

    @property
    def starts(self) -> Int64[Integers, " responses"]:
        """Index of the first token of each response."""
        return np.cumsum(self.lengths) - self.lengths

    def log_weights(self) -> Float64[Floats, " responses"]:
        """Log of the importance weight of each response (nats)."""
        return np.add.reduceat(self.log_ratio, self.starts)

    def select(self, chosen: NDArray[np.bool_]) -> Difference:
        """The responses for which `chosen` [m] is true; at least one."""
        tokens = np.repeat(chosen, self.lengths)
        return Difference(self.log_ratio[tokens], self.rollout[tokens], self.lengths[chosen])


def measures(
    difference: Difference, cap: float, counts: Float64[Floats, "resamples responses"] | None = None
) -> dict[str, Float64[Floats, " resamples"]]:
    """Every measure of the module's table, by name.

    Args:
        difference: what is measured.
        cap: weights above this count as cut.
        counts: how often each response is in each resample; None: once each, in a single one. Every row has a response.
    """
    log_weights = difference.log_weights()
    each = _sums(difference, log_weights, cap)
    if counts is None:
        counts = np.ones((1, len(difference.lengths)))
    with np.errstate(all="ignore"):
        total = dict(zip(COLUMNS, (counts @ each).T, strict=True))
        tokens, responses = total["tokens"], total["responses"]
        of_tokens = {name: total[name] / tokens for name in COLUMNS[1:6]}
        of_responses = {name: total[name] / responses for name in COLUMNS[10:13]}
        p99, largest = _order_statistics(difference, counts)
        log_sum, log_squares = (logsumexp(n * log_weights[None], axis=1, b=counts) for n in (1, 2))
        return {
            "mean": of_tokens.pop("mean"),
            "p99": p99,
            "max": largest,
            **of_tokens,
            **of_responses,
            "chi2_token": total["rho_squared"] / tokens - 1,
            "chi2_seq": total["rho_squared_seq"] / responses - 1,
            "ess_token": total["rho"] ** 2 / (tokens * total["rho_squared"]),
            "ess_seq": np.exp(2 * log_sum - log_squares - np.log(responses)),
            "cut_token": total["cut_token"] / tokens,
            "cut_seq": total["cut_seq"] / responses,
        }


def _sums(
    difference: Difference, log_weights: Float64[Floats, " responses"], cap: float
) -> Float64[Floats, "responses columns"]:
    """`COLUMNS` of each response."""
    d, lengths = difference.log_ratio, difference.lengths
    clamped = d.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    with np.errstate(all="ignore"):
        less_one = np.expm1(clamped)  # not exp(d) - 1, whose digits cancel where d is small
        rho = less_one + 1
        weighted = rho * clamped
        of_tokens = [np.abs(d), -d, np.expm1(d) - d, weighted, weighted - less_one, rho, rho * rho, d > np.log(cap)]
        mean = log_weights / lengths
        mean_rollout = np.add.reduceat(difference.rollout, difference.starts) / lengths
        of_responses = [
            np.ones(len(lengths)),
            np.exp(-(mean + mean_rollout)),
            np.exp(-mean_rollout),
            np.exp(-mean),
            np.exp(2 * log_weights.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)),
            log_weights > np.log(cap),
        ]
    sums = [np.add.reduceat(x.astype(np.float64), difference.starts) for x in of_tokens]
    return np.stack([lengths, *sums, *of_responses], axis=1).astype(np.float64)


def _order_statistics(
    difference: Difference, counts: Float64[Floats, "resamples responses"]
) -> tuple[Float64[Floats, " resamples"], Float64[Floats, " resamples"]]:
    """The smallest |d| that 99 % of the tokens do not exceed, and the largest of all, in each resample."""
    size = np.abs(difference.log_ratio)
    if len(counts) == 1 and (counts == 1).all():
        place = int(np.ceil(P99 * len(size))) - 1
        parted = np.partition(size, (place, len(size) - 1))
        return parted[place : place + 1], parted[-1:]
    order = size.argsort()
    response = np.repeat(np.arange(len(difference.lengths)), difference.lengths)[order]
    p99, largest = np.empty(len(counts)), np.empty(len(counts))
    for i, row in enumerate(counts):
        below = row[response].cumsum()
        places = np.searchsorted(below, [P99 * below[-1], below[-1]])
        p99[i], largest[i] = size[order[places]]
    return p99, largest


def length_classes(lengths: Int64[Integers, " responses"]) -> Int64[Integers, " responses"]:
    """Class of each length: class c holds the lengths from 2^c to 2^(c+1) - 1."""
    return np.frexp(lengths)[1].astype(np.int64) - 1


def by_length(difference: Difference, cap: float) -> list[dict[str, float] | None]:
    """The measures in each class of response length, from class 0 to the last that is not empty; None where one is."""
    classes = length_classes(difference.lengths)
    found: list[dict[str, float] | None] = [None] * (int(classes.max()) + 1)
    for c in np.unique(classes).tolist():
        found[c] = {name: float(x[0]) for name, x in measures(difference.select(classes == c), cap).items()}
    return found


def mismatch_row(ranks: Ranks, measured: Sequence[tuple[Rollouts, Tensor]], cap: float) -> dict[str, Any]:
    """What a row of `metrics.jsonl` says about the difference; empty if no token was measured.

    Args:
        ranks: those that made the passes together; every one must call this, and gets the same row.
        measured: the rollouts of each minibatch, on all ranks together, and this rank's part [n, t] of their
            log-probabilities in a training pass, in host memory.
        cap: weights above this count as cut.
    """
    passes = ranks.gather([logprobs for _, logprobs in measured])
    parts = []
    for (rollouts, _), logprobs in zip(measured, zip(*passes, strict=True), strict=True):
        joined = torch.cat([part for part in logprobs if len(part)])
        parts.append((rollouts.logprobs, joined, rollouts.response_mask))
    if not any(bool(mask.any()) for _, _, mask in parts):
        return {}
    difference = Difference.of(parts)
    row: dict[str, Any] = {PREFIX + name: float(value[0]) for name, value in measures(difference, cap).items()}
    classes = by_length(difference, cap)
    lists = {f"{PREFIX}{name}_lengths": [None if c is None else c[name] for c in classes] for name in BY_LENGTH}
    return row | lists
