"""The parts of a chip's arithmetic: number formats, matmul noise, deadzones and faults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from roundoff.config.base import LATER, Fraction, Positive, Settings, Share, Whole, nearest, rule
from roundoff.config.changes import NONE
from roundoff.formats.spelling import spelled
from roundoff.formats.table import FORMATS, get_format

FORMAT_NAMES = tuple(FORMATS)
"""Names of all formats of the table; one's own formats have other names."""
PLAIN_FORMAT_NAMES = ", ".join(name for name in FORMATS if ":" not in name)
"""The same without those that add a rule, for messages."""


def _as_word(value: Any) -> Any:
    return spelled(value) if isinstance(value, Mapping) else value


def known_format(name: str) -> str:
    """The name of a format as settings hold it: a word that spells out a known format becomes the known name.

    Raises:
        ValueError: if there is no such format; the message is a clause that begins with "must" or names the fault.
    """
    if "/" in name:
        return get_format(name).name
    try:
        get_format(name)
    except ValueError:
        raise ValueError(
            f"must be a number format{nearest(name, FORMAT_NAMES)} (known: {PLAIN_FORMAT_NAMES}; "
            "`roundoff list --formats` shows all, and how to spell your own)"
        ) from None
    return name


def activation_format(name: str) -> str:
    """The same for activations, whose blocks must lie within a token."""
    name = known_format(name)
    if get_format(name).rows > 1:
        raise ValueError(
            "must be a format whose blocks lie within a token (two-dimensional ones span tokens; weights may have them)"
        )
    return name


def attention_format(name: str) -> str:
    """The same for the operands of attention's products, of which P has the keys on its axis of blocks."""
    name = activation_format(name)
    if get_format(name).block is not None:
        raise ValueError(
            "must be a format without blocks, such as fp8_e4m3, int8 or hif8: blocks of attention weights would lie "
            "along the keys, where padding and later tokens move them (kv_cache takes formats with blocks)"
        )
    return name


FormatName = Annotated[str, BeforeValidator(_as_word), AfterValidator(known_format)]
"""A name among `formats.table.FORMATS`, or a format of one's own: a word as in `formats.spelling`, or a table of its
parts, which becomes that word."""
ActivationFormatName = Annotated[str, BeforeValidator(_as_word), AfterValidator(activation_format)]
MaybeFormat = Annotated[FormatName | None, BeforeValidator(lambda value: _format_or_none(value))]
"""The same, or "none" for high precision."""
MaybeActivationFormat = Annotated[ActivationFormatName | None, BeforeValidator(lambda value: _format_or_none(value))]
AttentionFormatName = Annotated[str, BeforeValidator(_as_word), AfterValidator(attention_format)]
MaybeAttentionFormat = Annotated[AttentionFormatName | None, BeforeValidator(lambda value: _format_or_none(value))]


def _kept_layers(value: Any) -> Any:
    scan = isinstance(value, str) and re.fullmatch(r"srdd:[1-9]\d*", value)
    if not scan and not (isinstance(value, list | tuple) and all(type(v) is int for v in value)):
        raise ValueError(
            "must be a list of layer indices (from 0, or from -1 for the last one), or 'srdd:k' with k of at least 1"
        )
    return value


def _format_or_none(value: Any) -> Any:
    return None if isinstance(value, str) and value == NONE else value


ADC_RANGE = 12.0
"""Default of `adc_range`: `out_bound` of IBM's aihwkit."""


class MatmulNoise(Settings):
    """Errors on the output of every matrix product, by default the published `y + s*abs(y)*eps`.

    In this order: Gaussian noise, a constant gain of each output channel, a converter to digital numbers. Noise is
    drawn anew for every product; gain and converter concern the forward product of Linears and experts alone.
    """

    relative_std: Fraction = 0.0
    """`s`: standard deviation of the noise relative to its `scale` (fraction; 5 % is 0.05)."""
    forward: bool = True
    """Whether the product of the forward pass is perturbed."""
    backward: bool = True
    """Whether the two products of the backward pass, `dX` and `dW`, are perturbed."""
    attention: bool = True
    """Whether attention's QK^T and PV are perturbed as well as the Linear layers."""
    scale: Annotated[Literal["output", "operands", "row"], LATER] = "output"
    """What the noise is relative to. `output`: `abs(y)` of each element; `operands`: the root of the sum of the squared
    products that the element adds, `sqrt(sum_k (x_k*w_k)^2)`; `row`: the root mean square of the element's row."""
    gain_std: Annotated[Fraction, LATER] = 0.0
    """Standard deviation of the relative error of each output channel's gain, `y*(1 + gain_std*g)`, with `g ~ N(0, 1)`
    drawn once, from the seed of `install` and the module's name (fraction)."""
    adc_bits: Annotated[
        int | None, rule(lambda v: v is None or 2 <= v <= 16, "must be a whole number of bits, 2 to 16"), LATER
    ] = None
    """Bits of the converter that reads each output; None means that there is none."""
    adc_range: Annotated[Positive, LATER] = ADC_RANGE
    """Range of the converter, beyond which it saturates, in units of `max(abs(x))` of the token times `max(abs(W))`."""

    @classmethod
    def settled(cls, values: dict[str, Any], written: frozenset[str]) -> dict[str, Any]:
        """The values without what refined a noise or a converter that is gone."""
        refine: dict[str, Any] = {} if values["relative_std"] else {"scale": "output"}
        refine |= {} if values["adc_bits"] else {"adc_range": ADC_RANGE}
        return values | {name: default for name, default in refine.items() if name not in written}

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.relative_std > 0 and not (self.forward or self.backward):
            raise ValueError("perturbs nothing: set forward or backward to true, or relative_std to 0")
        return self

    @model_validator(mode="after")
    def _parts_belong_together(self) -> Self:
        if self.scale != "output" and not self.relative_std:
            raise ValueError(f"scale = {self.scale!r} does nothing without noise: set relative_std")
        if self.scale == "row" and self.attention:
            raise ValueError(
                "scale = 'row' cannot be used in attention, where a row of scores includes masked keys and padding, so "
                "that a token's result would depend on them: set attention to false"
            )
        if (self.gain_std or self.adc_bits) and not self.forward:
            name = "gain_std" if self.gain_std else "adc_bits"
            raise ValueError(f"{name} concerns the product of the forward pass: set forward to true")
        if self.adc_range != ADC_RANGE and self.adc_bits is None:
            raise ValueError(f"adc_range = {self.adc_range:g} does nothing without a converter: set adc_bits")
        return self

    @property
    def changes_products(self) -> bool:
        """Whether any product of a Linear has an error."""
        return bool(self.relative_std or self.gain_std or self.adc_bits)

    @property
    def attention_std(self) -> float:
        """Relative standard deviation of the noise on attention's products (fraction)."""
        return self.relative_std if self.attention else 0.0

    @property
    def other_errors(self) -> tuple[str, ...]:
        """In words, what is set besides the published noise: the scale of the noise, the gain and the converter."""
        scale = {"operands": "noise relative to the operands", "row": "noise relative to the row"}
        parts = [scale[self.scale]] if self.scale != "output" else []
        parts += [f"gain error {self.gain_std:g}"] if self.gain_std else []
        parts += [f"{self.adc_bits}-bit converter, range {self.adc_range:g}"] if self.adc_bits else []
        return tuple(parts)


class Precision(Settings):
    """Number formats of the operands of every Linear and of attention; None leaves them unquantized."""

    weight: MaybeFormat = None
    """Format of `Linear.weight`, with blocks along `in_features`."""
    activation: MaybeActivationFormat = None
    """Format of the input of a Linear, with blocks along its last axis."""
    gradient: Annotated[MaybeActivationFormat, LATER] = None
    """Format of the gradient of a Linear's output in both products of the backward pass, each along the axis that the
    product sums over; None lets gradients pass straight through the other formats."""
    gradient_rounding: Annotated[Literal["nearest", "stochastic"], LATER] = "nearest"
    """How gradients are rounded."""
    hadamard: Annotated[Literal["none", "dw"], LATER] = "none"
    """Whether both operands of `dW` are multiplied by an orthogonal matrix, in groups of 16 tokens, before they are
    quantized."""
    kv_cache: Annotated[MaybeActivationFormat, LATER] = None
    """Format of the keys, after their position embedding, and of the values of every attention layer: each token and
    key head is one row, with blocks along the head."""
    attention: Annotated[MaybeAttentionFormat, LATER] = None
    """Format of both operands of QK^T and of PV: one row for each token and head, and for the weights of each query."""
    keep: Annotated[tuple[int, ...] | str, BeforeValidator(_kept_layers)] = ()
    """Decoder layers left in high precision: a list of indices (-1 is the last layer), or `srdd:k` for the k layers
    that the scan ranks as most sensitive."""

    @classmethod
    def settled(cls, values: dict[str, Any], written: frozenset[str]) -> dict[str, Any]:
        """The values without what refined a format that is gone."""
        refine: dict[str, Any] = (
            {"gradient_rounding": "nearest", "hadamard": NONE} if values["gradient"] is None else {}
        )
        if not any(values[name] for name in ("weight", "activation", "gradient", "kv_cache", "attention")):
            refine["keep"] = ()
        return values | {name: default for name, default in refine.items() if name not in written}

    @property
    def quantizes_forward(self) -> bool:
        """Whether an operand of the forward pass has a format."""
        return bool(self.weight or self.activation or self.kv_cache or self.attention)

    @model_validator(mode="after")
    def _keeps_from_something(self) -> Self:
        if self.keep and not (self.quantizes_forward or self.gradient):
            keep = self.keep if isinstance(self.keep, str) else list(self.keep)
            raise ValueError(f"keep = {keep!r} does nothing without a format: set weight or activation")
        return self

    @model_validator(mode="after")
    def _gradients_have_a_format(self) -> Self:
        for name, unused in (("gradient_rounding", "nearest"), ("hadamard", "none")):
            value = getattr(self, name)
            if value != unused and self.gradient is None:
                raise ValueError(f"{name} = {value!r} does nothing without a format of gradients: set gradient")
        if self.gradient_rounding == "stochastic" and self.gradient in ("bf16", "fp16"):
            raise ValueError(f"gradient_rounding = 'stochastic' is not defined for the cast {self.gradient!r}")
        return self


class Deadzone(Settings):
    """Elements of a Linear's input with `abs(x) < threshold * max(abs(x))` become zero."""

    threshold: Annotated[float, rule(lambda v: 0 < v < 1, "must be in (0, 1)")]
    """Threshold relative to the largest magnitude of the token (fraction)."""
    layers: tuple[Whole, ...]
    """Decoder layers that have the deadzone."""


class Fault(Settings):
    """One broken unit and its effect on the output of the Linear layers that it computes."""

    kind: Literal["deadzone", "saturation", "noise", "stuck", "bitflip", "gain"]
    layer: Whole
    """Decoder layer that the faulty unit computes."""
    module: str | None = None
    """Name of one Linear within the layer, such as `mlp.up_proj`; None means all of them."""
    amount: Positive
    """Size of the fault. `deadzone` and `saturation`: threshold relative to the token's max(abs(y)) (fraction);
    `noise`: relative standard deviation (fraction); `gain`: relative error of the gain (fraction); `stuck`: the
    constant output, in units of y; `bitflip` ignores it."""
    share: Share = 1.0
    """Share affected: of the output channels for `deadzone`, `saturation`, `stuck` and `gain`, of the elements for
    `noise` and `bitflip`."""
    bit: Annotated[int, rule(lambda v: 0 <= v < 32, "must be a bit of float32, 0 to 31")] = 22
    """Bit of float32 that `bitflip` inverts, from 0 (lowest bit of the mantissa) to 31 (sign)."""
