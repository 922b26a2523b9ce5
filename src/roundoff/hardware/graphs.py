"""Products on hardware within a model under `torch.compile`: they are computed outside of its graphs.

A graph would hold what is true while it is traced: the `Q(W)` of that moment, without the check whether the weight was
written to since, and one key of the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable, but the compiler is imported at the first call

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, computed eagerly also where its caller is compiled."""
    eager: Callable[P, R] = _disable_dynamo(function)

    @functools.wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        return eager(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return chosen
