"""Operations and memory traffic of one decoder layer, as counted by `python -m benchmarks operations`."""

from __future__ import annotations

from dataclasses import dataclass, fields

FIXED_OPERATIONS = 14
"""Number of operations of a pass outside the decoder layers."""


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of one decoder layer besides its matrix products."""

    operations: float
    """Number of operations, each weighted by its time relative to one of the plain model, Python included."""
    hidden: float
    """Elements read and written per token, in units of the hidden size."""
    intermediate: float
    """Elements read and written per token, in units of the intermediate size."""
    score: float = 0.0
    """Elements read and written per attention score."""

    def plus(self, other: Work) -> Work:
        """The sum of both."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


@dataclass(frozen=True, slots=True)
class Passes:
    """Work of a decoder layer in a forward pass, and in a forward and backward pass."""

    forward: Work
    training: Work


PLAIN = Passes(Work(36, 45, 8), Work(117, 182, 26))
"""A decoder layer of the plain model."""
FUSED = Work(14, 15, 3)
"""A layer of the fused decoder, which samples from short prompts on a CPU: seven Linears and three kernels."""
NOTHING = Passes(Work(0, 0, 0), Work(0, 0, 0))
ADDED = {
    ("activation", True): Passes(Work(20, 8, 2.5), Work(20, 8, 2.5)),
    ("activation", False): Passes(Work(104, 87, 31), Work(104, 102, 32)),
    ("gradient", True): Passes(Work(0, 0, 0), Work(45, 48, 16)),
    ("gradient", False): Passes(Work(0, 0, 0), Work(300, 480, 160)),
    ("kv_cache", True): Passes(Work(10, 3, 0), Work(10, 3, 0)),
    ("kv_cache", False): Passes(Work(44, 41, 0), Work(44, 41, 0)),
    ("attention", True): Passes(Work(28, 9, 0, 10), Work(32, 9, 0, 20)),
    ("attention", False): Passes(Work(90, 79, 0, 20), Work(94, 80, 0, 30)),
    ("noise", True): Passes(Work(54, 9, 6, 3), Work(135, 27, 18, 9)),
    ("noise", False): Passes(Work(740, 900, 360, 340), Work(2230, 5250, 1130, 1020)),
}
"""What hardware adds to a layer, by its kind and by whether the compiled kernels are used. A format of the weights
costs nothing per token.

Operations are weighted by their measured time. On the torch path an operation of a format takes 0.65 to 0.85, and one
of noise 0.39, of the time of an operation of the plain model, which includes the Python of its module. Those of
gradients are counted by hand from `hardware.gradients`: three operands are quantized, two of them after a copy; so are
those of attention's scores, of which eager attention reads and writes each about ten times.
"""
