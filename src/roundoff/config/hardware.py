"""What the chip does to the arithmetic: number formats, matmul noise, deadzones and faults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from roundoff.config.base import LATER, Fraction, Positive, Settings, Share, Whole, nearest, rule
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
AttentionFormatName = Annotated[str, BeforeValidator(_as_word), AfterValidator(attention_format)]


def _kept_layers(value: Any) -> Any:
    scan = isinstance(value, str) and re.fullmatch(r"srdd:[1-9]\d*", value)
    if not scan and not (isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)):
        raise ValueError("must be a list of layer indices from 0, or 'srdd:k' with k of at least 1")
    return value


class MatmulNoise(Settings):
    """Relative Gaussian error `y + s*abs(y)*eps` on the output of every matrix product."""

    relative_std: Fraction = 0.0
    """`s`: standard deviation relative to each output element (fraction; 5 % is 0.05)."""
    forward: bool = True
    """Whether the product of the forward pass is perturbed."""
    backward: bool = True
    """Whether the two products of the backward pass, `dX` and `dW`, are perturbed."""
    attention: bool = True
    """Whether attention's QK^T and PV are perturbed as well as the Linear layers."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.relative_std > 0 and not (self.forward or self.backward):
            raise ValueError("perturbs nothing: set forward or backward to true, or relative_std to 0")
        return self


class Precision(Settings):
    """Number formats of the operands of every Linear and of attention; None leaves them unquantized."""

    weight: FormatName | None = None
    """Format of `Linear.weight`, with blocks along `in_features`."""
    activation: ActivationFormatName | None = None
    """Format of the input of a Linear, with blocks along its last axis."""
    gradient: Annotated[ActivationFormatName | None, LATER] = None
    """Format of the gradient of a Linear's output in both products of the backward pass, each along the axis that the
    product sums over; None lets gradients pass straight through the other formats."""
    gradient_rounding: Annotated[Literal["nearest", "stochastic"], LATER] = "nearest"
    """How gradients are rounded."""
    hadamard: Annotated[Literal["none", "dw"], LATER] = "none"
    """Whether both operands of `dW` are multiplied by an orthogonal matrix, in groups of 16 tokens, before they are
    quantized."""
    kv_cache: Annotated[ActivationFormatName | None, LATER] = None
    """Format of the keys, after their position embedding, and of the values of every attention layer: each token and
    key head is one row, with blocks along the head."""
    attention: Annotated[AttentionFormatName | None, LATER] = None
    """Format of both operands of QK^T and of PV: one row for each token and head, and for the weights of each query."""
    keep: Annotated[tuple[int, ...] | str, BeforeValidator(_kept_layers)] = ()
    """Decoder layers left in high precision: a list of indices, or `srdd:k` for the k layers that the scan ranks as
    most sensitive."""

    @property
    def quantizes_forward(self) -> bool:
        """Whether an operand of the forward pass has a format."""
        return bool(self.weight or self.activation or self.kv_cache or self.attention)

    @model_validator(mode="after")
    def _keeps_from_something(self) -> Self:
        if self.keep and not (self.quantizes_forward or self.gradient):
            raise ValueError(f"keep = {self.keep!r} does nothing without a format: set weight or activation")
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


class Hardware(Settings):
    """What the chip does to the arithmetic, in rollout, training and evaluation alike."""

    precision: Precision = Precision()
    matmul_noise: MatmulNoise = MatmulNoise()
    deadzone: Deadzone | None = None
    faults: tuple[Fault, ...] = ()
    exclude: tuple[str, ...] = ("embed_tokens", "lm_head")
    """Shell patterns of modules to leave in plain arithmetic, matched against each module's dotted name and against
    each part of it."""

    @property
    def changes_nothing(self) -> bool:
        """Whether this is plain arithmetic, so that deployed and clean scores are equal."""
        quantized = self.precision.quantizes_forward or self.precision.gradient
        return not (quantized or self.matmul_noise.relative_std or self.deadzone or self.faults)

    @property
    def concerns_attention(self) -> bool:
        """Whether attention is computed otherwise than in the plain model: noise on its products, or a format in it."""
        noise = self.matmul_noise
        return bool((noise.relative_std and noise.attention) or self.precision.kv_cache or self.precision.attention)

    @property
    def separates_rollouts(self) -> bool:
        """Whether every rollout needs a training pass of its own over its prompt.

        That is so if something is drawn for each token, or if gradients are quantized: a gradient that is summed over
        rollouts before it is quantized is another number.
        """
        return bool(self.matmul_noise.relative_std or self.faults or self.precision.gradient)

    @property
    def draws_in_training(self) -> bool:
        """Whether anything in a training pass is random: the forward pass, noise on gradients, or their rounding."""
        return bool(self.is_noisy or self.matmul_noise.relative_std or self.precision.gradient_rounding == "stochastic")

    @property
    def is_noisy(self) -> bool:
        """Whether the forward pass is random: two evaluations of one input differ unless they use the same key."""
        noise = self.matmul_noise
        return (noise.relative_std > 0 and noise.forward) or any(f.kind in ("noise", "bitflip") for f in self.faults)
