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
    nvfp4:te    the same in the order of operations of Transformer Engine (`numerics.nvfp4`)
    nvfp4:46, nvfp4:46_mae     four over six: of two scales, the one with the smaller squared, or absolute, error
    nvfp4:2d, nvfp4:46_2d, nvfp4:46_mae_2d     the last three in blocks of 16 x 16
    hif8, hif4  HiFloat8 and HiFloat4 of Ascend NPUs (`numerics.hifloat`)
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

import dataclasses
import difflib
import functools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from roundoff.formats.element import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_MAX,
    E4M3_MAX_46,
    E5M2,
    HIF8,
    S1P2,
    Element,
    integers,
)
from roundoff.formats.spelling import parts_of

Scale = Literal["none", "e8m0", "e4m3", "float32", "e6m2"]
Rule = Literal["", "floor", "ceil", "even", "rceil", "te", "46", "46_mae"]

LARGEST_BLOCK = 1 << 16
"""Most elements that a block may have."""
MX_BLOCK = 32  # OCP MX v1.0, section 5.2
NVFP4_BLOCK = 16
HIF4_BLOCK = 64  # 8 groups of 8, each of two groups of 4 (arXiv:2602.11287)
INT4_GROUP = 32
# In the order of the enums `Scale` and `Rule` of kernels/blocks.h, where tapered elements follow the scales.
_SCALES: tuple[Scale, ...] = ("none", "e8m0", "e4m3", "float32", "e6m2")
_TAPERED = len(_SCALES)
_MX_RULES: tuple[Rule, ...] = ("floor", "ceil", "even", "rceil")
_FOUR_OVER_SIX: tuple[Rule, ...] = ("46", "46_mae")
_RULES: tuple[Rule, ...] = (*_MX_RULES, "te", *_FOUR_OVER_SIX)
_SCALE_BITS: Mapping[Scale, int] = {
    "none": 0,
    "e8m0": 8,
    "e4m3": 8,
    "float32": 32,
    "e6m2": 8 + 8 + 16,  # with HiF4's micro-exponents, one for each group of 8 and of 4
}
_RULES_OF: Mapping[Scale, tuple[Rule, ...]] = {
    "none": ("",),
    "e8m0": ("", *_MX_RULES),
    "e4m3": ("", "te", *_FOUR_OVER_SIX),
    "float32": ("",),
    "e6m2": ("",),
}


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: the grid of an element, how many elements share a scale, and what a scale may be.

    Raises:
        ValueError: if the parts do not fit together, such as blocks without a scale.
    """

    name: str
    element: Element | None
    """Grid of the elements; None for a plain cast (bf16, fp16)."""
    block: int | None
    """Number of elements along the axis that share a scale; None for a whole row, or for the whole tensor if `scale` is
    "none" and `tensor_divisor` is set."""
    scale: Scale
    """Values that the scale of a block may take: powers of two (e8m0), E4M3 numbers, any float32, or HiF4's (e6m2)."""
    rule: Rule = ""
    """How the scale is derived from a block's amax: for E8M0 one of four rules; for E4M3 `te` (the order of operations
    of Transformer Engine), or four over six by the squared (`46`) or the absolute error (`46_mae`)."""
    divisor: float = 1.0
    """A block's scale is its amax divided by this."""
    tensor_divisor: float | None = None
    """The tensor's float32 scale is its amax divided by this; None if the tensor has no scale."""
    rows: int = 1
    """Number of rows that a block spans: above 1, blocks are two-dimensional, `rows` x `block`."""
    packed: bytes = field(init=False, repr=False, compare=False)
    """This format as the struct `Spec` of kernels/blocks.h."""
    has_kernel: bool = field(init=False, repr=False, compare=False)
    """Whether the compiled kernels of the CPU know this layout as it stands. Blocks of several rows are laid out as
    rows first, which the kernels may know; other formats are computed in plain torch there."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"format {self.name!r} {problem}")
        e = self.element or Element("", 0, 0, 0, 0.0, 0.0)
        rule = _RULES.index(self.rule or "floor")
        scale = _TAPERED if e.tapered else _SCALES.index(self.scale)
        integers = (scale, rule, self.block or 0, e.mantissa_bits, e.emin, e.emax)
        packed = struct.pack("=6i4f", *integers, e.low, e.high, self.divisor, self.tensor_divisor or 0.0)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "has_kernel", self.element is not None and self._is_laid_out_as_kernels_are())

    def _problem(self) -> str | None:
        """What does not fit together, or None."""
        hif4 = self.element == S1P2 and self.block == HIF4_BLOCK and self.rows == 1
        tapered = self.element is not None and self.element.tapered
        faults = {
            f"has blocks of {self.block} without a scale: set scale, or block=None": (
                self.scale == "none" and self.block is not None
            ),
            f"has blocks of {self.rows} rows, but no number of columns: set block": self.rows > 1 and not self.block,
            f"has blocks of {self.rows} x {self.block}; both must be at least 1": min(self.rows, self.block or 1) < 1,
            f"has blocks of {self.rows} x {self.block}, above {LARGEST_BLOCK} elements": (
                self.rows * (self.block or 1) > LARGEST_BLOCK
            ),
            f"has the rule {self.rule!r}, which is none for a scale in {self.scale}": (
                self.rule not in _RULES_OF[self.scale]
            ),
            f"has the rule {self.rule!r}, which needs elements in E2M1 and a scale of the tensor": (
                self.rule in _FOUR_OVER_SIX and not (self.element == E2M1 and self.tensor_divisor)
            ),
            "has a scale in E6M2, which is defined for blocks of 64 elements in S1P2": (
                self.scale == "e6m2" and not hif4
            ),
            "has tapered elements, which have no scale": (
                tapered and (self.scale != "none" or self.tensor_divisor is not None)
            ),
        }
        return next((text for text, wrong in faults.items() if wrong), None)

    @property
    def bits(self) -> float:
        """Bits that a number takes in storage, with its share of the block's scale.

        A scale for a row or for the tensor is not counted, because its share depends on the size of the tensor.
        """
        if self.element is None:
            return 16.0
        shared = _SCALE_BITS[self.scale] / (self.rows * self.block) if self.block else 0.0
        return self.element.bits + shared

    @property
    def follows_transformer_engine(self) -> bool:
        """Whether a block is computed in the order of operations of Transformer Engine."""
        return self.rule == "te" or self.rule in _FOUR_OVER_SIX

    @property
    def tries_two_scales(self) -> bool:
        """Whether two scales are tried for each block (four over six)."""
        return self.rule in _FOUR_OVER_SIX

    def _is_laid_out_as_kernels_are(self) -> bool:
        assert self.element is not None
        integer = self.element.is_integer
        layouts = {
            "none": self.block is None,
            "e8m0": self.block == MX_BLOCK and not integer,
            # Two-dimensional blocks are laid out as rows of one block each.
            "e4m3": not integer and self.block in (NVFP4_BLOCK, NVFP4_BLOCK**2 if self.rule else NVFP4_BLOCK),
            "float32": self.block is None or (self.block == INT4_GROUP and integer),
            "e6m2": True,
        }
        return layouts[self.scale] and self.rows == 1


def _table() -> dict[str, Format]:
    """Every format by name."""
    formats: list[Format] = []
    mx = {"mxfp4": E2M1, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2}
    for name, element in mx.items():
        for rule in _MX_RULES:
            full = name if rule == "floor" else f"{name}:{rule}"
            formats.append(Format(full, element, MX_BLOCK, "e8m0", rule, element.high))
    formats += [
        Format("nvfp4", E2M1, NVFP4_BLOCK, "e4m3", divisor=6.0, tensor_divisor=E4M3_MAX * 6.0),
        Format("nvfp4_block", E2M1, NVFP4_BLOCK, "e4m3", divisor=6.0),
        *_transformer_engine(),
        Format("hif8", HIF8, None, "none"),
        Format("hif4", S1P2, HIF4_BLOCK, "e6m2", divisor=7.0),
        Format("fp8_e4m3", E4M3, None, "none", tensor_divisor=E4M3_MAX),
        Format("fp8_e4m3_row", E4M3, None, "float32", divisor=E4M3_MAX),
        Format("int8", integers(-127, 127), None, "float32", divisor=127.0),
        Format("int8:full", integers(-128, 127), None, "float32", divisor=127.5),
        Format("int4", integers(-7, 7), INT4_GROUP, "float32", divisor=7.0),
        Format("int4:full", integers(-8, 7), INT4_GROUP, "float32", divisor=7.5),
        Format("bf16", None, None, "none"),
        Format("fp16", None, None, "none"),
    ]
    return {fmt.name: fmt for fmt in formats}


def _transformer_engine() -> Iterator[Format]:
    """NVFP4 in the order of operations of Transformer Engine, in blocks of 1 x 16 and 16 x 16, and four over six."""
    for rows in (1, NVFP4_BLOCK):
        for rule in ("te", *_FOUR_OVER_SIX):
            name = f"nvfp4:{rule}" if rows == 1 else "nvfp4:2d" if rule == "te" else f"nvfp4:{rule}_2d"
            largest = E4M3_MAX if rule == "te" else E4M3_MAX_46
            yield Format(name, E2M1, NVFP4_BLOCK, "e4m3", rule, 6.0, largest * 6.0, rows)


FORMATS: Mapping[str, Format] = MappingProxyType(_table())


@functools.cache
def _own_format(word: str) -> Format:
    """The format that a word spells out; one of `FORMATS` if it is the same."""
    own = Format(**parts_of(word))
    return next((fmt for fmt in FORMATS.values() if dataclasses.replace(fmt, name=own.name) == own), own)


def get_format(name: str) -> Format:
    """The format with this name; the default rule may be spelled out (`mxfp4:floor` is `mxfp4`).

    A name with slashes spells out a format of one's own (`spelling`).

    Raises:
        ValueError: if there is no such format; the message suggests the nearest names.
    """
    fmt = FORMATS.get(name)
    if fmt is not None:
        return fmt
    if "/" in name:
        return _own_format(name)
    base, _, rule = name.partition(":")
    default = FORMATS.get(base)
    if default is not None and rule and default.rule == rule:
        return default
    near = difflib.get_close_matches(name.lower(), list(FORMATS), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(FORMATS)}"
    raise ValueError(f"unknown number format {name!r}: {hint}")
