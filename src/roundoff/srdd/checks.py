"""Checks of one product and of one residual sum. They need no reference machine, because the right result is known.

| check | what it compares | what it cannot see |
|---|---|---|
| nonfinite | NaN or Inf in a weight, or computed from finite numbers | everything finite |
| replay | the same input twice, to the bit | an error that repeats itself |
| zero | share of outputs that are exactly zero | errors that produce no zeros |
| constant | channels that give one value for every token | channels that still vary |
| tie | tokens with several elements at exactly the largest magnitude | a clamp that only one element reaches |
| checksum | `r . y = (r W) . x + r . b`, for r all ones and seven Gaussian r | errors below rounding (low bits) |
| residual | `h_out = h_in + attention + mlp`, element by element | errors inside attention or a norm |

The checks compute in float64, and on the CPU if `host` is set, so that a faulty accelerator does not judge itself. The
residual bound is rigorous: two roundings. The bound of the checksum is statistical. Rounding errors are taken as
independent: one with y's unit roundoff u for each output, and K with float32's unit roundoff v for each sum of K
products. A checksum is therefore measured in units of `sqrt(sum_j r_j^2 (u^2 y_j^2 + K v^2 sum_k (x_k W_jk)^2))`, and
more than `CHECKSUM_LIMIT` such units raise an alarm; healthy models stay below 2 (docs/srdd.md). Products that
accumulate in less than float32 (TF32, say) would raise it, and rightly so.

**Odds of missing an error.** An error d in one token's outputs moves a Gaussian checksum by r . d ~ N(0, |d|^2). It is
missed if all `GAUSSIANS` = 7 checksums stay within the limit of L = 5 units U. Each does so with probability at most
`sqrt(2/pi) L U / |d|`, independently. An error of |d| >= 50 U in one token is therefore missed with probability at most
`(0.8 * 5 / 50)^7 = 2e-8`, whatever its shape: exchanged, shifted, negated or copied channels, a permuted tile, errors
that cancel in the sum. Errors in T tokens share the vectors, so their odds do not multiply; the largest error counts.
(A vector of all ones and one of random signs would miss an exchange of two channels half of the time.)
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float
from scipy.stats import binom
from torch import Tensor

from roundoff.numerics.rng import Key, normal

ZERO_LIMIT = 1e-3
"""Share of exact zeros above which a result is suspect, before `ZERO_ROUNDINGS` * u is added."""
ZERO_ROUNDINGS = 8.0
"""Allowance for sums of few bits, which cancel to exactly zero: 0.1 % of a bfloat16 residual stream."""
TIED = 3
"""Number of elements at exactly the largest magnitude that makes a token a tied one."""
TIE_CHANCE = 0.02
"""Bound on the probability that a token of a healthy product is tied by chance; measured: at most 0.5 %
(docs/srdd.md)."""
ALARM_ODDS = 1e-9
"""Probability of a false alarm by zeros, or by ties, at one site."""
MIN_TOKENS = 8
"""Number of different tokens below which a constant channel proves nothing."""
CHECKSUM_LIMIT = 5.0
"""Rounding units above which a checksum raises an alarm."""
GAUSSIANS = 7
"""Number of checksums with Gaussian weights, besides the one with all ones."""
RESIDUAL_LIMIT = 1.0
"""Multiple of the rigorous rounding bound above which a residual sum raises an alarm."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


@functools.cache
def zero_limit(dtype: torch.dtype, elements: int) -> float:
    """Share of exact zeros, among this many elements of this dtype, above which a result is suspect."""
    chance = ZERO_LIMIT + ZERO_ROUNDINGS * unit_roundoff(dtype)
    return max(chance, _binomial_limit(elements, chance))


def same_bits(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> bool:
    """Whether two tensors of one floating-point dtype hold the same bits; NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.equal(first.contiguous().view(integer), second.contiguous().view(integer))


def zero_share(y: Float[Tensor, "tokens out_features"], live: Bool[Tensor, " out_features"]) -> float:
    """Share of exact zeros in the live channels of `y`: those whose weights are not all zero."""
    if not bool(live.any()):
        return 0.0
    return float((y[:, live] == 0).double().mean())


def constant_channels(
    y: Float[Tensor, "tokens out_features"], live: Bool[Tensor, " out_features"]
) -> Bool[Tensor, " out_features"]:
    """Which live channels of `y` have the same value for all tokens; none if there are few tokens."""
    if len(y) < MIN_TOKENS:
        return torch.zeros_like(live)
    return live & (y == y[:1]).all(0)


def tie_share(y: Float[Tensor, "tokens out_features"]) -> float:
    """Share of the tokens of `y` that have `TIED` or more elements at exactly the largest magnitude, if above 0."""
    size = y.abs()
    largest = size.amax(-1, keepdim=True)
    return float((((size == largest) & (largest > 0)).sum(-1) >= TIED).double().mean())


def loses_bits(
    x: Float[Tensor, "tokens in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
    dtype: torch.dtype,
) -> bool:
    """Whether all elements of `x W^T + b` are so small that numbers of this dtype lose bits or flush to zero.

    Zeros, ties and deviations then prove nothing.
    """
    largest = x.shape[-1] * float(x.abs().max()) * float(weight.abs().max())  # Python's numbers: nothing overflows
    if bias is not None:
        largest += float(bias.abs().max())
    return largest < torch.finfo(dtype).tiny / torch.finfo(dtype).eps


@functools.cache
def tie_limit(tokens: int) -> float:
    """Share of this many different tokens that may be tied; a healthy machine exceeds it with odds below `ALARM_ODDS`.

    Numbers of few bits tie by chance, in one token of a hundred, so that a few tied tokens prove nothing. The count of
    tied tokens is binomial with a probability of at most `TIE_CHANCE`.
    """
    return _binomial_limit(tokens, TIE_CHANCE)


def _binomial_limit(count: int, chance: float) -> float:
    """Share of `count` events of probability `chance` that is exceeded with odds below `ALARM_ODDS`."""
    return float(binom.isf(ALARM_ODDS, count, chance)) / max(1, count)


def checksum_excess(
    x: Float[Tensor, "tokens in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
    y: Float[Tensor, "tokens out_features"],
    key: Key,
) -> float:
    """Largest deviation of a checksum of `y = x W^T + b` over tokens, in rounding units (see the module's docstring).

    `key` draws the Gaussian weights of the checksums.
    """
    output_eps, sum_eps = unit_roundoff(y.dtype), unit_roundoff(torch.float32)
    x, y = x.double(), y.double()
    drawn = normal(key, (GAUSSIANS, y.shape[-1]), device=y.device).double()
    projections = torch.cat([torch.ones_like(drawn[:1]), drawn])  # [1 + GAUSSIANS, out_features]
    squares = projections.square()
    columns = torch.zeros(len(projections), x.shape[-1], dtype=torch.float64, device=x.device)
    energy = torch.zeros_like(columns)
    pieces = (torch.split(tensor, 1024, dim=-1) for tensor in (projections, squares))
    for rows, weights, weights_squared in zip(torch.split(weight, 1024), *pieces, strict=True):
        wide = rows.double()
        columns += weights @ wide
        energy += weights_squared @ wide.square_()
    expected = x @ columns.T  # [tokens, 1 + GAUSSIANS]
    units = output_eps**2 * (y.square() @ squares.T) + x.shape[-1] * sum_eps**2 * (x.square() @ energy.T)
    if bias is not None:
        expected = expected + projections @ bias.double()
        units = units + output_eps**2 * (squares @ bias.double().square())
    deviation = (y @ projections.T - expected).abs()
    return float((deviation / (units.sqrt() + 1e-300)).nan_to_num(torch.inf).amax())


def residual_excess(
    before: Float[Tensor, "tokens hidden"],
    parts: list[Float[Tensor, "tokens hidden"]],
    after: Float[Tensor, "tokens hidden"],
) -> float:
    """Largest deviation of `after = before + sum(parts)` over elements, as a multiple of the rounding bound.

    Each addition errs by at most eps times its result, which is at most the sum of the magnitudes.
    """
    eps = unit_roundoff(after.dtype)
    terms = [before.double(), *(part.double() for part in parts)]
    expected = torch.stack(terms).sum(0)
    bound = len(parts) * eps * torch.stack([term.abs() for term in terms]).sum(0) * (1 + 4 * eps) + 1e-300
    return float(((after.double() - expected).abs() / bound).nan_to_num(torch.inf).amax())
