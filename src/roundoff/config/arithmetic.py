"""How a chip sums the products of a Linear, and what its errors follow."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from roundoff.config.base import Count, Settings

MANTISSA_BITS = {"bf16": 7, "fp16": 10, "fp32": 23}
"""Mantissa bits, without the leading one, of the formats in which a partial sum may be kept."""
LEAST_BITS, MOST_BITS = 2, 23


def _mantissa(value: Any) -> Any:
    number = type(value) is int and LEAST_BITS <= value <= MOST_BITS
    if not number and not (isinstance(value, str) and value in MANTISSA_BITS):
        raise ValueError(
            f"must be a number of mantissa bits, {LEAST_BITS} to {MOST_BITS} (without the leading one, as float32 has "
            f"23), or one of {', '.join(map(repr, MANTISSA_BITS))}"
        )
    return value


class Accumulator(Settings):
    """The sum of products in every Linear, forward and backward, by an accumulator of few bits.

    `roundoff.numerics.accumulate` defines the arithmetic. The default describes Hopper's tensor cores in FP8.
    """

    bits: Annotated[int | str, BeforeValidator(_mantissa)]
    """Mantissa bits of a partial sum without the leading one, in the exponent range of float32; or the format that it
    is kept in: `bf16` (7 bits), `fp16` (10 bits and its range: a sum beyond 65,504 becomes infinite) or `fp32` (23)."""
    promote: Count = 128
    """Number of products after which the partial sum is added to a float32 accumulator and begins again from zero."""
    group: Count = 32
    """Number of products that one instruction adds to the partial sum, which is rounded after each (Hopper: 32)."""
    rounding: Literal["align", "truncate", "nearest"] = "align"
    """`align`: each product of a group, and the partial sum, loses the bits below the last place of the largest among
    them, then all are added exactly (Hopper). `truncate` and `nearest`: the products of a group are added exactly, and
    the new partial sum is rounded toward zero, or to nearest with ties to even."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.promote % self.group:
            raise ValueError(
                f"promotes after {self.promote} products, which is no multiple of group = {self.group}: set group to a "
                "divisor of promote"
            )
        return self

    @property
    def mantissa(self) -> int:
        """Mantissa bits of a partial sum, without the leading one."""
        return MANTISSA_BITS[self.bits] if isinstance(self.bits, str) else self.bits

    @property
    def in_words(self) -> str:
        """The accumulator in words, such as `sums of 13 bits (align, groups of 32, promoted every 128)`."""
        kept = self.bits if isinstance(self.bits, str) else f"{self.bits} bits"
        return f"sums of {kept} ({self.rounding}, groups of {self.group}, promoted every {self.promote})"
