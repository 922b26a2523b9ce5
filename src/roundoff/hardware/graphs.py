"""Under `torch.compile`, products on hardware are computed outside of the compiled graphs.

A graph would freeze the state at tracing: the `Q(W)` of that moment, without the check for later writes to the weight,
and one key of the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable, except that it imports the compiler at first use

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it runs eagerly even if its caller is compiled."""
    eager: Callable[P, R] = _disable_dynamo(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return eager(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return wrapper
