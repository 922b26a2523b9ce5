"""Which two experiments are on the same chip: a remedy is measured on one chip, and a cost between two.

Some settings of `hardware` are choices of software on a given chip, and therefore remedies: which layers stay in high
precision, how gradients are rounded, the Hadamard transform, by which rule the scale of a block is chosen, and whether
a block of weights spans several rows.
"""

from __future__ import annotations

from roundoff.config import PHASES, Hardware
from roundoff.formats.table import get_format

_FORMATS = ("weight", "activation", "gradient", "kv_cache", "attention")


def same_chip(one: Hardware, other: Hardware) -> bool:
    """Whether two hardwares are the same in every phase but for choices of software."""
    return all(_chip(one.of(phase)) == _chip(other.of(phase)) for phase in PHASES)


def same_deployment(one: Hardware, other: Hardware) -> bool:
    """Whether the deployed scores of both are taken on the same chip, whatever chip each was trained on."""
    return _forward(one.of("evaluation")) == _forward(other.of("evaluation"))


def _chip(hardware: Hardware) -> object:
    """What one phase has without choices of software."""
    precision = hardware.precision
    formats = tuple(_units(getattr(precision, name)) for name in _FORMATS)
    plain = {"precision": None, "rollout": None, "training": None, "evaluation": None}
    return formats, hardware.model_copy(update=plain)


def _forward(hardware: Hardware) -> object:
    """The same without what only a backward pass has."""
    noise = hardware.matmul_noise.model_copy(update={"backward": True})
    precision = hardware.precision.model_copy(update={"gradient": None})
    return _chip(hardware.model_copy(update={"matmul_noise": noise, "precision": precision}))


def _units(name: str | None) -> object:
    """What a chip must be able to do for a format: multiply its elements, and its scales at this width of a block."""
    if name is None:
        return None
    known = get_format(name)
    return known.element or known.name, known.block, known.scale, known.tensor_divisor is not None
