"""What ranks send each other, as bytes: JSON that refers to tensors, and the tensors in safetensors' format.

Nothing that is received can run code: there is no pickle. A message is made of None, booleans, numbers, texts, lists,
tuples, dictionaries, paths, tensors, roundoff's own dataclasses and errors. A dataclass or an error is sent by its
name; a name that is none of roundoff's dataclasses, or no error of roundoff's or Python's own, is refused.

    8 bytes     length of the JSON (little endian)
    JSON        the value; {"tensor": 3} stands for the tensor of the name "3"
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
"""Bytes of the length in front."""


class MessageError(RoundoffError, TypeError):
    """A value that cannot be sent to another rank, or bytes that are no message."""


def encode(value: Any) -> bytes:
    """The value as a message.

    Raises:
        MessageError: if a part of it is none of the kinds that can be sent.
    """
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    head = json.dumps(_plain(value, tensors)).encode()
    return len(head).to_bytes(HEAD, "little") + head + (save(tensors) if tensors else b"")


def decode(message: bytes, device: str) -> Any:
    """The value of a message, its tensors on `device`.

    Raises:
        MessageError: if it names what is neither a dataclass of roundoff nor an error.
    """
    from safetensors.torch import load

    end = HEAD + int.from_bytes(message[:HEAD], "little")
    content, rest = json.loads(message[HEAD:end]), message[end:]
    tensors = {name: tensor.to(device) for name, tensor in load(rest).items()} if rest else {}
    return _value(content, tensors)


def _plain(value: Any, tensors: dict[str, Any]) -> Any:
    """The value as plain JSON; everything but None, booleans, numbers and texts is an object of one key, its kind."""
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
        # a copy, for safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    raise MessageError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to another rank")


def _value(content: Any, tensors: Mapping[str, Any]) -> Any:
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
    found = _named(module, name) if module.partition(".")[0] == PACKAGE else None
    if not (isinstance(found, type) and is_dataclass(found)):
        raise MessageError(f"{module}.{name} is no dataclass of {PACKAGE}, and nothing else is received")
    return found(**{key: _value(item, tensors) for key, item in content.items()})


def _plain_error(error: Exception) -> list[Any]:
    """Module, name and arguments of an error that arrives as what it is; of others the words, as a RuntimeError."""
    kind = type(error)
    made = error.__reduce__()  # of an OSError it has the file, which `args` lacks
    arguments = made[1] if isinstance(made, tuple) else error.args
    with suppress(Exception):  # a class may refuse to be made again in ways of its own
        plain = [kind.__module__, kind.__qualname__, json.loads(json.dumps(list(arguments)))]
        again = _error(*plain)
        if type(again) is kind and str(again) == str(error):
            return plain
    return ["builtins", "RuntimeError", [f"{kind.__name__}: {error}"]]


def _error(module: str, name: str, arguments: list[Any]) -> Exception:
    own = module.partition(".")[0] == PACKAGE
    found = _named(module, name) if own else getattr(builtins, name, None) if module == "builtins" else None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise MessageError(f"{module}.{name} is no error of {PACKAGE} or of Python, and nothing else is received")
    made: Exception = found(*arguments)
    return made


def _named(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
