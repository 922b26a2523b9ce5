"""Shapes in signatures, checked as functions are called.

jaxtyping has an import hook of its own, which wraps every function and so doubles the time of a training step. This one
wraps only functions whose annotations hold a shape, checks nothing but shapes, and checks the first calls of each
function in each test.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch
from jaxtyping import AbstractArray, jaxtyped

SHAPE = "[Tensor,"
"""What every annotation with a shape holds."""
MOST_CALLS = 20
"""Calls of each function that are checked in each test."""
CALLS: Counter[str] = Counter()
"""Calls checked so far in the current test, by function."""


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


class CheckedLoader(Loader):
    """Loads a module, then wraps what has shapes in its annotations."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.loader.exec_module(module)
        check_module(module)


class CheckedFinder(MetaPathFinder):
    """Finds the modules of some packages as usual, and has their shapes checked."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = CheckedLoader(spec.loader)
        return spec


def check_imports(packages: Sequence[str]) -> None:
    """Have the shapes checked in every module of these packages that is imported from now on."""
    sys.meta_path.insert(0, CheckedFinder(packages))


def checked_at_first(function: Any) -> Any:
    """The function, whose shapes are checked in its first calls of each test."""
    checked = jaxtyped(function, typechecker=check)
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or CALLS[name] >= MOST_CALLS:
            return function(*arguments, **options)
        CALLS[name] += 1
        return checked(*arguments, **options)

    return call


def check_module(module: types.ModuleType) -> None:
    """Wrap the functions and methods of a module whose annotations hold a shape."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) and has_shapes(value):
            setattr(module, name, checked_at_first(value))
        elif inspect.isclass(value):
            for method, function in shaped_methods(value):
                setattr(value, method, checked_at_first(function))


def shaped_methods(owner: type) -> Iterator[tuple[str, Any]]:
    """Methods of a class whose annotations hold a shape."""
    for name, function in list(vars(owner).items()):
        if inspect.isfunction(function) and has_shapes(function):
            yield name, function


def has_shapes(function: Any) -> bool:
    """Whether an annotation of a function holds a shape; annotations are strings in roundoff."""
    return any(SHAPE in str(annotation) for annotation in function.__annotations__.values())
