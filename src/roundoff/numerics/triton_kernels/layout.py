"""What the kernels must know of a format, as a constant that each kernel is compiled for."""

from __future__ import annotations

from typing import NamedTuple

from roundoff.formats.element import E2M1, S1P2, Element
from roundoff.formats.table import Format, Rule, Scale

NONE, E8M0, E4M3, FLOAT32, E6M2 = range(5)
NO_RULE, FLOOR, CEIL, EVEN, RCEIL, TE, SQUARED, ABSOLUTE = range(8)
_SCALES: tuple[Scale, ...] = ("none", "e8m0", "e4m3", "float32", "e6m2")
_RULES: tuple[Rule, ...] = ("", "floor", "ceil", "even", "rceil", "te", "46", "46_mae")
GIVEN_ONE, FROM_MAXIMA = 5, 6
"""Origins of the tensor scales that the kernels know beside those of `numerics.blocks`: one that was given, for all
rows, and the largest magnitude of each row."""
LONGEST_ROW = 16384
"""Elements of a row that a kernel holds in registers: 32 for each of the 512 threads of sixteen warps."""
_BLOCKS = tuple(2**k for k in range(2, 11))  # from 4, the columns that share a counter of the generator


class Layout(NamedTuple):
    """The numbers of a `Format`; `roundoff.formats.table` explains them."""

    scale: int
    rule: int
    rows: int
    """Rows that a block spans."""
    columns: int
    """Columns that a block spans; 0 for a whole row or a whole tensor."""
    mantissa: int
    """0 for a grid of integers."""
    emin: int
    emax: int
    tapered: int
    """1 for the grid of HiF8. The numbers up to here are integers."""
    low: float
    high: float
    divisor: float
    tensor_divisor: float
    """0.0 if the tensor has no scale."""


def layout_of(fmt: Format) -> Layout | None:
    """The layout of a format, or None if no kernel knows it and plain torch is to be used.

    The kernels know every kind of scale and every rule, for blocks of 4 to 1,024 elements whose rows and columns are
    powers of two.
    """
    e = fmt.element
    if e is None or (not e.is_integer and e.low != -e.high):
        return None
    if fmt.block is not None and (fmt.rows * fmt.block not in _BLOCKS or fmt.block not in (1, 2, *_BLOCKS)):
        return None
    if fmt.block is None and (fmt.rows > 1 or fmt.scale not in ("none", "float32")):
        return None
    if fmt.tensor_divisor is not None and fmt.scale not in ("none", "e4m3"):
        return None
    scale, rule = _SCALES.index(fmt.scale), _RULES.index(fmt.rule)
    if scale == E8M0:
        rule = rule or FLOOR
    grid = (e.mantissa_bits, e.emin, e.emax, int(e.tapered), e.low, e.high)
    return Layout(scale, rule, fmt.rows, fmt.block or 0, *grid, fmt.divisor, fmt.tensor_divisor or 0.0)


def format_of(form: Layout) -> Format:
    """The format of a layout, without its name."""
    numbers = (form.mantissa, form.emin, form.emax, form.low, form.high, bool(form.tapered))
    element = next((known for known in (E2M1, S1P2) if known == Element(known.name, *numbers)), Element("", *numbers))
    block, scale, rule = form.columns or None, _SCALES[form.scale], _RULES[form.rule]
    return Format("", element, block, scale, rule, form.divisor, form.tensor_divisor or None, form.rows)


def holds_rows(columns: int, form: Layout) -> bool:
    """Whether the kernel for whole rows knows the format, and its registers hold a row of this length."""
    return columns <= LONGEST_ROW and form.rows == 1 and form.rule <= TE
