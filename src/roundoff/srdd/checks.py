"""Checks of one product and of one residual sum, which need no reference machine: what is right is known.

| check | what it compares | what it cannot see |
|---|---|---|
| nonfinite | NaN or Inf in a weight, or made out of finite numbers | everything finite |
| replay | the same input twice, to the bit | an error that repeats itself |
| zero | share of outputs that are exactly zero | errors that zero nothing |
| constant | channels that give one value for every token | channels that still vary |
| tie | tokens with several elements at exactly the largest magnitude | a clamp that one element meets |
| checksum | `r . y = (r W) . x + r . b`, for r all ones and for random signs | errors below rounding (low bits) |
| residual | `h_out = h_in + attention + mlp`, element by element | errors inside attention or a norm |

Checks compute in float64, on the CPU if `host` is set, so that a faulty accelerator does not judge itself. The residual
bound is rigorous: two roundings. The checksum's is statistical: rounding errors are taken as independent, one of y's
unit roundoff u for each output and K of float32's unit roundoff v for each sum of K products, so a checksum is measured
in units of `sqrt(u^2 sum_j y_j^2 + K v^2 sum_jk (x_k W_jk)^2)`. `CHECKSUM_LIMIT` such units are an alarm; healthy
models stay below 2 (docs/srdd.md). Products that accumulate in less than float32 (TF32, say) would raise it rightly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roundoff.numerics.rng import Key, uniform

ZERO_LIMIT = 1e-3
"""Share of exact zeros above which a result is suspect (fraction), to which `ZERO_ROUNDINGS` * u are added."""
ZERO_ROUNDINGS = 8.0
"""Sums of few bits cancel to exactly zero: 0.1 % of a bfloat16 residual stream."""
TIE_LIMIT = 0.05
"""Share of tokens with `TIED` or more elements at the maximum above which a product is suspect (fraction)."""
TIED = 3
MIN_TOKENS = 8
"""Tokens below which a constant channel says nothing."""
CHECKSUM_LIMIT = 5.0
"""Rounding units above which a checksum is an alarm."""
RESIDUAL_LIMIT = 1.0
"""Multiple of the rigorous rounding bound above which a residual sum is an alarm."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def zero_limit(dtype: torch.dtype) -> float:
    """Share of exact zeros above which a result of this dtype is suspect (fraction)."""
    return ZERO_LIMIT + ZERO_ROUNDINGS * unit_roundoff(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one floating-point dtype hold the same bits (NaN equals itself)."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.equal(first.contiguous().view(integer), second.contiguous().view(integer))


def zero_share(y: Tensor, live: Tensor) -> float:
    """Share of exact zeros of `y` [T, N] in live channels [N]: those that are not zero by their weights."""
    if not bool(live.any()):
        return 0.0
    return float((y[:, live] == 0).double().mean())


def constant_channels(y: Tensor, live: Tensor) -> Tensor:
    """Live channels [N] whose value is one and the same for all tokens of `y` [T, N]; none for few tokens."""
    if len(y) < MIN_TOKENS:
        return torch.zeros_like(live)
    return live & (y == y[:1]).all(0)


def tie_share(y: Tensor) -> float:
    """Share of the tokens of `y` [T, N] with `TIED` or more elements at exactly the largest magnitude, above 0."""
    size = y.abs()
    largest = size.amax(-1, keepdim=True)
    return float((((size == largest) & (largest > 0)).sum(-1) >= TIED).double().mean())


def checksum_excess(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, key: Key) -> float:
    """Largest deviation of a checksum of `y = x W^T + b` over tokens, in rounding units (see the module's docstring).

    Shapes: x [T, in], weight [out, in], bias [out], y [T, out].
    """
    output_eps, sum_eps = unit_roundoff(y.dtype), unit_roundoff(torch.float32)
    x, y = x.double(), y.double()
    signs = torch.where(uniform(key, (1, y.shape[-1]), device=y.device) < 0.5, -1.0, 1.0).double()
    projections = torch.cat([torch.ones_like(signs), signs])  # [2, out]
    columns = torch.zeros(2, x.shape[-1], dtype=torch.float64, device=x.device)
    energy = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    for rows, signed in zip(torch.split(weight, 1024), torch.split(projections, 1024, dim=1), strict=True):
        wide = rows.double()
        columns += signed @ wide
        energy += wide.square_().sum(0)
    expected = x @ columns.T
    units = output_eps**2 * y.square().sum(-1) + x.shape[-1] * sum_eps**2 * (x.square() @ energy)
    if bias is not None:
        expected = expected + projections @ bias.double()
        units = units + output_eps**2 * bias.double().square().sum()
    deviation = (y @ projections.T - expected).abs()
    return float((deviation / (units.sqrt() + 1e-300)[:, None]).nan_to_num(torch.inf).amax())


def residual_excess(before: Tensor, parts: list[Tensor], after: Tensor) -> float:
    """Largest deviation of `after = before + sum(parts)` over elements, as a multiple of the rounding bound.

    Each of the n additions errs by at most eps times its result, which is at most the sum of the magnitudes.
    """
    eps = unit_roundoff(after.dtype)
    terms = [before.double(), *(part.double() for part in parts)]
    expected = torch.stack(terms).sum(0)
    bound = len(parts) * eps * torch.stack([term.abs() for term in terms]).sum(0) * (1 + 4 * eps) + 1e-300
    return float(((after.double() - expected).abs() / bound).nan_to_num(torch.inf).amax())
