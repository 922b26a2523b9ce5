"""The table of number formats.

**Block formats for a newcomer.** Four bits encode sixteen numbers. FP4 (E2M1: 1 sign, 2 exponent and 1 mantissa bit)
spends them on +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}: dense near zero and sparse far from it. The values of a weight matrix do
not fit that grid, so a *block* of neighbours shares one *scale*: a number is stored as (element, scale) and means
`element * scale`. Quantize-dequantize, the operation simulated here, is

    out = round_to_grid(x / scale) * scale            round to nearest, ties to even; saturate at the end of the grid

Blocks lie along the contraction axis of a matrix product, so that the hardware can factor the scale out of the sum. The
formats differ in the grid, in the number of elements that share a scale, and in the values that a scale may take.

**One worked block.** Four elements of an MXFP4 block, whose other 28 are zero: `x = [0.30, -1.00, 2.50, 7.00]`.
    amax = 7.00, floor(log2 7.00) = 2, FP4's largest exponent (emax) is 2, so scale = 2^(2 - 2) = 1
    x / scale     0.30   -1.00    2.50    7.00
    nearest FP4   0.5    -1.0     2.0     6.0       2.5 is a tie between 2 and 3, of which 2 is even; 7 saturates
Under the rule `ceil` the scale is 2: x / 2 = [0.15, -0.5, 1.25, 3.5] -> [0, -0.5, 1.0, 4.0] -> [0, -1, 2, 8]. Nothing
saturates, but small numbers are rounded more coarsely. The four scale rules are different answers to that trade-off.

**Formats** (`FORMATS`). A suffix `:rule` selects a rule; without a suffix the first rule listed here applies.
    mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2      OCP Microscaling (MX) v1.0: blocks of 32, scale 2^k in
        E8M0 (k in [-127, 127]). Rules, with m = the element's mantissa bits:
          floor  k = floor(log2 amax) - emax                    OCP MX v1.0, section 6.3; may saturate
          ceil   k = ceil(log2 amax) - emax                     never saturates, but wastes up to one bit
          even   like floor, after rounding amax half up to m mantissa bits
          rceil  k = ceil(log2(amax / largest element))         the smallest power of two that does not saturate
    nvfp4       blocks of 16; scale in E4M3, relative to one float32 scale `amax_tensor / (448 * 6)` for the tensor
    nvfp4_block the same without the tensor's scale. Weights of sigma 0.02 push block scales into E4M3's subnormals; at
                sigma 0.001 nothing is left. It demonstrates that, and serves tensors that were scaled beforehand.
    fp8_e4m3, fp8_e4m3_row     one float32 scale `amax / 448` for the tensor, or for each row
    int8, int8:full            one float32 scale per row: `amax / 127` on [-127, 127], or `amax / 127.5` on [-128, 127]
    int4, int4:full            the same for groups of 32: `amax / 7` on [-7, 7], or `amax / 7.5` on [-8, 7]
    bf16, fp16                 a plain cast and back, without a scale; infinities stay, and fp16 overflows to infinity

**Where public implementations disagree.** They choose different MX scales: torchao and microxcaling default to `floor`,
compressed-tensors to `even`, modelopt to `rceil`. On normal data, 4.4 % of MXFP4 elements differ between `floor` and
`even`, and 8.0 % between `floor` and `rceil`. The signal-to-quantization-noise ratio on N(0, 1) is 18.79 dB for floor,
19.03 for even, 18.75 for rceil and 16.82 for ceil (NVFP4: 20.43). Some public code falls into each of these traps, too:

- A floating-point `log2` is wrong next to powers of two. Here exponents are read from bits.
- An epsilon added to amax ruins blocks of tiny numbers.
- Rounding half up instead of half to even changes 0.7 % of bfloat16 elements.
- There are several variants of E4M3. Here it is "fn": maximum 448, with subnormals, without infinity.
- Multiplying by `1 / scale` instead of dividing by `scale` moves ties.

**Left out.** Only values are simulated. There is no packed storage, no NaN code of E8M0 (a block that holds NaN or Inf
becomes NaN throughout, which is what that code means), and no accumulation specific to some hardware.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Scale = Literal["none", "e8m0", "e4m3", "float32"]
Rule = Literal["", "floor", "ceil", "even", "rceil"]

MX_BLOCK = 32  # OCP MX v1.0, section 5.2
NVFP4_BLOCK = 16
INT4_GROUP = 32
E4M3_MAX = 448.0
# In the order of the enums `Scale` and `Rule` of kernels/blocks.h.
_SCALES: tuple[Scale, ...] = ("none", "e8m0", "e4m3", "float32")
_RULES: tuple[Rule, ...] = ("floor", "ceil", "even", "rceil")


@dataclass(frozen=True, slots=True)
class Element:
    """A grid of numbers: floating point with subnormals and without infinity, or the integers from `low` to `high`."""

    name: str
    mantissa_bits: int
    """Explicit bits of the mantissa; 0 for an integer grid."""
    emin: int
    """Exponent of the smallest normal number; 0 for an integer grid."""
    emax: int
    """Exponent of the largest number; 0 for the integer grids of `FORMATS`, whose scales do not use it."""
    low: float
    """Smallest number of the grid."""
    high: float
    """Largest number of the grid."""

    @property
    def is_integer(self) -> bool:
        """Whether the grid is the integers from `low` to `high`."""
        return self.mantissa_bits == 0


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: the grid of an element, how many elements share a scale, and what a scale may be.

    Raises:
        ValueError: if there are blocks but no scale for them.
    """

    name: str
    element: Element | None
    """Grid of the elements; None for a plain cast (bf16, fp16)."""
    block: int | None
    """Number of elements along the axis that share a scale; None for a whole row, or for the whole tensor if `scale` is
    "none" and `tensor_divisor` is set."""
    scale: Scale
    """Values that the scale of a block may take: powers of two (e8m0), E4M3 numbers, or any float32."""
    rule: Rule = ""
    """How an E8M0 scale is derived from a block's amax."""
    divisor: float = 1.0
    """A block's scale is its amax divided by this."""
    tensor_divisor: float | None = None
    """The tensor's float32 scale is its amax divided by this; None if the tensor has no scale."""
    packed: bytes = field(init=False, repr=False, compare=False)
    """This format as the struct `Spec` of kernels/blocks.h."""
    has_kernel: bool = field(init=False, repr=False, compare=False)
    """Whether the compiled kernels know this layout; other formats are computed in plain torch everywhere."""

    def __post_init__(self) -> None:
        if self.scale == "none" and self.block is not None:
            raise ValueError(
                f"format {self.name!r} has blocks of {self.block} without a scale: set scale, or block=None"
            )
        e = self.element or Element("", 0, 0, 0, 0.0, 0.0)
        rule = _RULES.index(self.rule or "floor")
        integers = (_SCALES.index(self.scale), rule, self.block or 0, e.mantissa_bits, e.emin, e.emax)
        packed = struct.pack("=6i4f", *integers, e.low, e.high, self.divisor, self.tensor_divisor or 0.0)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "has_kernel", self.element is not None and self._is_laid_out_as_kernels_are())

    def _is_laid_out_as_kernels_are(self) -> bool:
        integer = self.element is not None and self.element.is_integer
        layouts = {
            "none": self.block is None,
            "e8m0": self.block == MX_BLOCK and not integer,
            "e4m3": self.block == NVFP4_BLOCK and not integer,
            "float32": self.block is None or (self.block == INT4_GROUP and integer),
        }
        return layouts[self.scale]


E2M1 = Element("e2m1", 1, 0, 2, -6.0, 6.0)
E2M3 = Element("e2m3", 3, 0, 2, -7.5, 7.5)
E3M2 = Element("e3m2", 2, -2, 4, -28.0, 28.0)
E4M3 = Element("e4m3", 3, -6, 8, -E4M3_MAX, E4M3_MAX)
E5M2 = Element("e5m2", 2, -14, 15, -57344.0, 57344.0)


def _integers(low: int, high: int) -> Element:
    return Element(f"int[{low}, {high}]", 0, 0, 0, float(low), float(high))


def _table() -> dict[str, Format]:
    """Every format by name."""
    formats: list[Format] = []
    mx = {"mxfp4": E2M1, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2}
    for name, element in mx.items():
        for rule in _RULES:
            full = name if rule == "floor" else f"{name}:{rule}"
            formats.append(Format(full, element, MX_BLOCK, "e8m0", rule, element.high))
    formats += [
        Format("nvfp4", E2M1, NVFP4_BLOCK, "e4m3", divisor=6.0, tensor_divisor=E4M3_MAX * 6.0),
        Format("nvfp4_block", E2M1, NVFP4_BLOCK, "e4m3", divisor=6.0),
        Format("fp8_e4m3", E4M3, None, "none", tensor_divisor=E4M3_MAX),
        Format("fp8_e4m3_row", E4M3, None, "float32", divisor=E4M3_MAX),
        Format("int8", _integers(-127, 127), None, "float32", divisor=127.0),
        Format("int8:full", _integers(-128, 127), None, "float32", divisor=127.5),
        Format("int4", _integers(-7, 7), INT4_GROUP, "float32", divisor=7.0),
        Format("int4:full", _integers(-8, 7), INT4_GROUP, "float32", divisor=7.5),
        Format("bf16", None, None, "none"),
        Format("fp16", None, None, "none"),
    ]
    return {fmt.name: fmt for fmt in formats}


FORMATS: Mapping[str, Format] = MappingProxyType(_table())


def get_format(name: str) -> Format:
    """The format with this name; the default rule may be spelled out (`mxfp4:floor` is `mxfp4`).

    Raises:
        ValueError: if there is no such format; the message suggests the nearest names.
    """
    fmt = FORMATS.get(name)
    if fmt is not None:
        return fmt
    base, _, rule = name.partition(":")
    default = FORMATS.get(base)
    if default is not None and rule and default.rule == rule:
        return default
    near = difflib.get_close_matches(name.lower(), list(FORMATS), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(FORMATS)}"
    raise ValueError(f"unknown number format {name!r}: {hint}")
