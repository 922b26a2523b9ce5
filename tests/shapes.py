"""A type checker for jaxtyping's import hook that looks at the shapes of tensors alone."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray


def mentions_shape(hint: Any) -> bool:
    """Whether an annotation holds the shape of a tensor anywhere."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(mentions_shape(part) for part in typing.get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the shapes that an annotation names; everything else about it may be anything."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if not mentions_shape(hint):
        return not isinstance(hint, type) or origin is not None or isinstance(value, hint)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return isinstance(value, tuple) and all(fits(part, arguments[0]) for part in value)
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is not None:
        return True  # containers and callables: not looked into
    return isinstance(value, hint)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising TypeError where an argument has another shape than its annotation says."""
    signature = inspect.signature(function)
    shaped = {name: p.annotation for name, p in signature.parameters.items() if mentions_shape(p.annotation)}
    if not shaped:
        return function

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options).arguments
        for name, hint in shaped.items():
            if name in bound and not fits(bound[name], hint):
                value = bound[name]
                shape = f"{value.dtype} {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
                raise TypeError(f"{name} is {shape}, which does not fit {hint}")
        return function(*arguments, **options)

    return checked
