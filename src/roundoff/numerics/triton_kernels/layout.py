"""What the kernels must know of a format, as a constant that each kernel is compiled for."""

from __future__ import annotations

from typing import NamedTuple

from roundoff.numerics.formats import Format

NONE, E8M0, E4M3, FLOAT32 = range(4)
FLOOR, CEIL, EVEN, RCEIL = range(4)
_SCALES = ("none", "e8m0", "e4m3", "float32")
_RULES = ("floor", "ceil", "even", "rceil")
_BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)  # four columns share a counter of the generator


class Layout(NamedTuple):
    """The numbers of a `Format`; `formats.py` explains them."""

    scale: int
    rule: int
    block: int
    """Elements that share a scale; 0 for a whole row or a whole tensor."""
    mantissa: int
    emin: int
    emax: int
    low: float
    high: float
    divisor: float
    tensor_divisor: float
    """0.0 if the tensor has no scale."""


def layout_of(fmt: Format) -> Layout | None:
    """The layout of a format, or None if no kernel knows it and plain torch is to be used.

    The kernels know the scales and rules of `formats.py` for blocks of any power of two from 4 to 1,024.
    """
    e = fmt.element
    if e is None or fmt.scale not in _SCALES or (fmt.rule or "floor") not in _RULES:
        return None
    if not e.is_integer and e.low != -e.high:
        return None
    if fmt.block is not None and fmt.block not in _BLOCKS:
        return None
    if fmt.block is None and fmt.scale in ("e8m0", "e4m3"):
        return None
    if fmt.tensor_divisor is not None and fmt.scale not in ("none", "e4m3"):
        return None
    scale, rule = _SCALES.index(fmt.scale), _RULES.index(fmt.rule or "floor")
    grid = (e.mantissa_bits, e.emin, e.emax, e.low, e.high)
    return Layout(scale, rule, fmt.block or 0, *grid, fmt.divisor, fmt.tensor_divisor or 0.0)
