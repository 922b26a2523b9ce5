"""The table of number formats.

**Block formats for a newcomer.** Four bits hold sixteen numbers. FP4 (E2M1: 1 sign, 2 exponent and 1 mantissa bit)
spends them on +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}: dense near zero, sparse far away. No weight matrix lives on that grid, so
a *block* of neighbours shares one *scale*, and a number is stored as (element, scale) and means `element * scale`.
Quantize-dequantize, the operation simulated here, is

    out = round_to_grid(x / scale) * scale            round to nearest, ties to even; saturate at the grid's end

Blocks lie along the contraction axis of a matrix product, so that the hardware can pull the scale out of the sum. What
distinguishes the formats is the grid, the number of elements that share a scale, and the numbers a scale may take.

**One worked block.** Four elements of an MXFP4 block (the other 28 zero): `x = [0.30, -1.00, 2.50, 7.00]`.
    amax = 7.00, floor(log2 7.00) = 2, FP4's largest exponent (emax) is 2, so scale = 2^(2 - 2) = 1
    x / scale     0.30   -1.00    2.50    7.00
    nearest FP4   0.5    -1.0     2.0     6.0       2.5 is a tie between 2 and 3: the even code is 2; 7 saturates
With the rule `ceil` the scale is 2: x / 2 = [0.15, -0.5, 1.25, 3.5] -> [0, -0.5, 1.0, 4.0] -> [0, -1, 2, 8]: nothing
saturates, yet everything small is coarser. That trade is what the four scale rules are about.

**Formats** (`FORMATS`; a suffix `:rule` picks a rule, no suffix the first one named here).
    mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2      OCP Microscaling (MX) v1.0: blocks of 32, scale 2^k in
        E8M0 (k in [-127, 127]). Rules, with m = the element's mantissa bits:
          floor  k = floor(log2 amax) - emax                    OCP MX v1.0, section 6.3; may saturate
          ceil   k = ceil(log2 amax) - emax                     never saturates, wastes up to a bit
          even   as floor, after amax is rounded half up to m mantissa bits
          rceil  k = ceil(log2(amax / largest element))         the smallest power of two that does not saturate
    nvfp4       blocks of 16, scale in E4M3 relative to one float32 scale `amax_tensor / (448 * 6)` for the tensor
    nvfp4_block the same without the tensor's scale. Weights of sigma 0.02 push block scales to E4M3's subnormals; at
                sigma 0.001 nothing is left. It is here to show that, and for tensors scaled by somebody else.
    fp8_e4m3, fp8_e4m3_row     one float32 scale `amax / 448` for the tensor, or for each row
    int8, int8:full            one float32 scale a row: `amax / 127` on [-127, 127], or `amax / 127.5` on [-128, 127]
    int4, int4:full            the same for groups of 32: `amax / 7` on [-7, 7], or `amax / 7.5` on [-8, 7]
    bf16, fp16                 a plain cast and back, no scale: infinities stay, fp16 overflows to infinity

**Where public implementations disagree.** The MX scale: torchao and microxcaling default to `floor`,
compressed-tensors to `even`, modelopt to `rceil`. Against floor on normal data 4.4 % and 8.0 % of MXFP4 elements
differ; SQNR on N(0, 1): floor 18.79, even 19.03, rceil 18.75, ceil 16.82 dB, NVFP4 20.43 dB. Further traps, each of
which some public code falls into: a floating-point `log2` errs next to powers of two (here exponents are read from
bits); an epsilon added to amax ruins blocks of tiny numbers; rounding half up instead of to even changes 0.7 % of
bfloat16 elements; E4M3 here is the "fn" variant (maximum 448, subnormals, no infinity); multiplying by `1 / scale`
instead of dividing moves ties.

**Left out.** Only values are simulated: no packed storage, no E8M0 NaN code on the wire (a block holding NaN or Inf is
NaN throughout, which is what that code means), no hardware-specific accumulation.
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
# Numbers of the enums `Scale` and `Rule` of kernels/blocks.h.
_SCALES: tuple[Scale, ...] = ("none", "e8m0", "e4m3", "float32")
_RULES: tuple[Rule, ...] = ("floor", "ceil", "even", "rceil")


@dataclass(frozen=True, slots=True)
class Element:
    """A grid of numbers: floating point with subnormals and no infinity, or the integers low..high."""

    name: str
    mantissa_bits: int  # 0 for an integer grid
    emin: int  # exponent of the smallest normal number; 0 for an integer grid
    emax: int  # exponent of the largest number
    low: float
    high: float

    @property
    def is_integer(self) -> bool:
        """Whether the grid is the integers from `low` to `high`."""
        return self.mantissa_bits == 0


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: an element grid, how many elements share a scale, and what a scale may be.

    `block` is the number of elements along the axis that share a scale; None means a whole row (or, where `scale` is
    "none" and `tensor_divisor` is set, the whole tensor). `divisor` turns a block's amax into its scale,
    `tensor_divisor` the tensor's amax into the tensor's float32 scale; None: there is no such scale.

    Raises:
        ValueError: there are blocks, but no scale for them.
    """

    name: str
    element: Element | None  # None: a plain cast (bf16, fp16)
    block: int | None
    scale: Scale
    rule: Rule = ""
    divisor: float = 1.0
    tensor_divisor: float | None = None
    packed: bytes = field(init=False, repr=False, compare=False)  # `Spec` of kernels/blocks.h
    has_kernel: bool = field(init=False, repr=False, compare=False)
    """Whether the compiled kernels know this layout; a format of one's own may take plain torch everywhere."""

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
    """The format of a name; the default rule may be spelled out (`mxfp4:floor` is `mxfp4`).

    Raises:
        ValueError: there is no such format; the message suggests the nearest names.
    """
    found = FORMATS.get(name)
    if found is not None:
        return found
    base, _, rule = name.partition(":")
    default = FORMATS.get(base)
    if default is not None and rule and default.rule == rule:
        return default
    near = difflib.get_close_matches(name.lower(), list(FORMATS), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(FORMATS)}"
    raise ValueError(f"unknown number format {name!r}: {hint}")
