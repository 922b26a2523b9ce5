"""The grids that single elements are rounded to."""

from __future__ import annotations

from dataclasses import dataclass

E4M3_MAX = 448.0
E4M3_MAX_46 = 256.0
"""Largest block scale of four over six, so that 1.5 times as much is an E4M3 number, too (arXiv:2512.02010)."""


@dataclass(frozen=True, slots=True)
class Element:
    """A grid of numbers: floating point with subnormals and without infinity, integers, or HiF8's tapered grid."""

    name: str
    mantissa_bits: int
    """Explicit bits of the mantissa; 0 for an integer grid; those of numbers near 1 for a tapered grid."""
    emin: int
    """Exponent of the smallest normal number; 0 for an integer grid."""
    emax: int
    """Exponent of the largest number: that of its highest bit for an integer grid."""
    low: float
    """Smallest number of the grid."""
    high: float
    """Largest number of the grid."""
    tapered: bool = False
    """Whether the mantissa shrinks as the exponent grows in magnitude, and what lies beyond `high` is infinite."""

    @property
    def bits(self) -> int:
        """Bits of one number, its sign among them."""
        if self.tapered:
            return 8
        if self.is_integer:
            return self.emax + 2
        exponents = self.emax - self.emin + 1  # of normal numbers; subnormal ones have a code beside them
        return 1 + exponents.bit_length() + self.mantissa_bits

    @property
    def bits_below_first(self) -> int:
        """Bits behind the highest one of numbers near the largest one."""
        return self.emax if self.is_integer else self.mantissa_bits

    @property
    def is_integer(self) -> bool:
        """Whether the grid is the integers from `low` to `high`."""
        return self.mantissa_bits == 0


E2M1 = Element("e2m1", 1, 0, 2, -6.0, 6.0)
E2M3 = Element("e2m3", 3, 0, 2, -7.5, 7.5)
E3M2 = Element("e3m2", 2, -2, 4, -28.0, 28.0)
E4M3 = Element("e4m3", 3, -6, 8, -E4M3_MAX, E4M3_MAX)
E5M2 = Element("e5m2", 2, -14, 15, -57344.0, 57344.0)
S1P2 = Element("s1p2", 2, 0, 0, -1.75, 1.75)
"""Sign, one bit before the binary point and two behind it: the element of HiF4."""
HIF8 = Element("hif8", 3, -22, 15, -(2.0**15), 2.0**15, tapered=True)


def integers(low: int, high: int) -> Element:
    """The grid of all integers from `low` to `high`."""
    return Element(f"int[{low}, {high}]", 0, 0, high.bit_length() - 1, float(low), float(high))


def minifloat(exponent_bits: int, mantissa_bits: int) -> Element:
    """Floating point with the usual bias 2^(exponent_bits - 1) - 1, all of whose codes are numbers.

    The known E4M3 and E5M2 keep codes for NaN (and infinity), so their largest numbers are 448 and 57344.
    """
    name = f"e{exponent_bits}m{mantissa_bits}"
    known = {element.name: element for element in (E2M1, E2M3, E3M2, E4M3, E5M2)}
    if name in known:
        return known[name]
    bias = 2 ** (exponent_bits - 1) - 1
    emax = 2**exponent_bits - 1 - bias
    high = (2 - 2.0**-mantissa_bits) * 2.0**emax
    return Element(name, mantissa_bits, 1 - bias, emax, -high, high)
