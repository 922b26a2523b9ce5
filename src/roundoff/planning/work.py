"""Operations and memory traffic of one decoder layer, as they were counted (`python -m benchmarks operations`)."""

from __future__ import annotations

from dataclasses import dataclass, fields

FIXED_OPERATIONS = 14
"""Operations of a pass outside the decoder layers."""


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of one decoder layer besides its matrix products."""

    operations: float
    """In units of an operation of the plain model, Python included."""
    hidden: float
    """Elements read and written a token, in units of the hidden size."""
    intermediate: float
    """The same in units of the intermediate size."""
    score: float = 0.0
    """Elements read and written an attention score."""

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


@dataclass(frozen=True, slots=True)
class Passes:
    """Work of a forward pass, and of a forward and backward pass."""

    forward: Work
    training: Work


PLAIN = Passes(Work(36, 45, 8), Work(117, 182, 26))


FUSED = Work(14, 15, 3)
"""A layer of the fused decoder, which samples from small prompts on a CPU: seven Linears and three kernels."""


NOTHING = Passes(Work(0, 0, 0), Work(0, 0, 0))


ADDED = {
    ("activation", True): Passes(Work(20, 8, 2.5), Work(20, 8, 2.5)),
    ("activation", False): Passes(Work(104, 87, 31), Work(104, 102, 32)),
    ("noise", True): Passes(Work(54, 9, 6, 3), Work(135, 27, 18, 9)),
    ("noise", False): Passes(Work(740, 900, 360, 340), Work(2230, 5250, 1130, 1020)),
}
"""What hardware adds, by kind and whether the compiled kernels are used. A weight's format costs nothing per token.

Operations are weighted by their measured time: on the torch path one of a format takes 0.65 to 0.85, one of noise 0.39
of an operation of the plain model, which carries the Python of its module.
"""
