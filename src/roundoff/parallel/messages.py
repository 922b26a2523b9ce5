"""The messages that ranks send each other: JSON that refers to tensors, and the tensors in safetensors' format.

A message cannot run code, because there is no pickle in it. It can hold None, booleans, numbers, text, lists, tuples,
dictionaries, paths, tensors, and roundoff's own dataclasses and errors. A dataclass or an error is sent by its name,
and the receiver refuses every name that is neither one of roundoff's dataclasses nor an error of roundoff or of Python.

    8 bytes     length of the JSON (little endian)
    JSON        the value; {"tensor": "3"} stands for the tensor named "3"
    the rest    safetensors
"""

from __future__ import annotations

import builtins
import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from roundoff.errors import RoundoffError

PACKAGE = __name__.partition(".")[0]
HEAD = 8
"""Number of bytes at the beginning that give the length of the JSON."""


class MessageError(RoundoffError, TypeError):
    """A value cannot be sent to another rank, or a received message is not valid."""


def encode(value: Any) -> bytes:
    """The value as a message.

    Raises:
        MessageError: if some part of it is of a kind that cannot be sent.
    """
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    head = json.dumps(_plain(value, tensors)).encode()
    return len(head).to_bytes(HEAD, "little") + head + (save(tensors) if tensors else b"")


def decode(message: bytes) -> Any:
    """The value of a message, with its tensors in host memory.

    Raises:
        MessageError: if it names anything but a dataclass of roundoff or an error.
    """
    from safetensors.torch import load

    end = HEAD + int.from_bytes(message[:HEAD], "little")
    content, rest = json.loads(message[HEAD:end]), message[end:]
    tensors = load(rest) if rest else {}
    return _value(content, tensors)


def _plain(value: Any, tensors: dict[str, Any]) -> Any:
    """The value as plain JSON; all but None, booleans, numbers and text become an object whose one key is the kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return {"list": [_plain(item, tensors) for item in value]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Exception):
        return {"error": _plain_error(value)}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        content = {f.name: _plain(getattr(value, f.name), tensors) for f in fields(value)}
        return {"dataclass": [kind.__module__, kind.__qualname__, content]}
    if _is_tensor(value):
        name = str(len(tensors))
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    raise MessageError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to another rank")


def _value(content: Any, tensors: Mapping[str, Any]) -> Any:
    """The value that `_plain` turned into JSON."""
    if not isinstance(content, dict):
        return content
    ((kind, inner),) = content.items()
    makers: dict[str, Callable[[], Any]] = {
        "list": lambda: [_value(item, tensors) for item in inner],
        "tuple": lambda: tuple(_value(item, tensors) for item in inner),
        "dict": lambda: {_value(key, tensors): _value(item, tensors) for key, item in inner},
        "path": lambda: Path(inner),
        "tensor": lambda: tensors[inner],
        "error": lambda: _error(*inner),
        "dataclass": lambda: _dataclass(inner, tensors),
    }
    return makers[kind]()


def _dataclass(inner: list[Any], tensors: Mapping[str, Any]) -> Any:
    module, name, content = inner
    kind = _named(module, name) if module.partition(".")[0] == PACKAGE else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise MessageError(f"{module}.{name} is not a dataclass of {PACKAGE}, and no other is received")
    return kind(**{key: _value(item, tensors) for key, item in content.items()})


def _plain_error(error: Exception) -> list[Any]:
    """Module, name and arguments that make the error again; where that fails, those of a RuntimeError in its words."""
    kind = type(error)
    reduced = error.__reduce__()  # for an OSError this includes the file, which `args` lacks
    arguments = reduced[1] if isinstance(reduced, tuple) else error.args
    with suppress(Exception):  # a class may refuse these arguments in ways of its own
        plain = [kind.__module__, kind.__qualname__, json.loads(json.dumps(list(arguments)))]
        again = _error(*plain)
        if type(again) is kind and str(again) == str(error):
            return plain
    return ["builtins", "RuntimeError", [f"{kind.__name__}: {error}"]]


def _error(module: str, name: str, arguments: list[Any]) -> Exception:
    own = module.partition(".")[0] == PACKAGE
    kind = _named(module, name) if own else getattr(builtins, name, None) if module == "builtins" else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise MessageError(f"{module}.{name} is not an error of {PACKAGE} or of Python, and no other is received")
    error: Exception = kind(*arguments)
    return error


def _named(module: str, name: str) -> Any:
    """The object of a qualified name in a module, or None."""
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
