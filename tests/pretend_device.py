"""A device that is not there: every tensor lies on the CPU, but remembers on which side the code put it.

Development machines have no accelerator, and on a CPU nothing shows that a tensor was left behind. Inside `pretended()`
torch's functions are watched: what is made on the device or moved to it says so (`device`, `is_cpu`), what is computed
from it is there too, and a call that mixes both sides raises, as it would on the device. Tensors whose side nobody
knows (saved for a backward pass, read from a file) may go with both. Layers that are computed again in a backward pass
(gradient checkpointing) cannot be watched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME = "cuda"
MARK = "pretended_side"
GETTERS = {getattr(torch.Tensor, name).__get__: name for name in ("device", "is_cpu", "is_cuda", "grad")}
SET_DATA = torch.Tensor.data.__set__
INDEXING = ("__getitem__", "__setitem__", "index_put", "index_put_")


class MixedDevicesError(AssertionError):
    """Tensors of both sides in one call."""


def side(tensor: torch.Tensor) -> str | None:
    """`cpu`, `cuda`, or None where nobody knows."""
    found: str | None = tensor.__dict__.get(MARK)
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _put(result: Any, where: str | None) -> Any:
    for tensor in _tensors(result):
        if where is not None:
            tensor.__dict__[MARK] = where
    return result


class _Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in GETTERS:
            return self._got(GETTERS[func], func, args)
        if func == SET_DATA:
            func(*args)
            _put(args[0], side(args[1]))
            return None
        if name in ("to", "cpu", "as_tensor"):
            return self._moved(name, func, args, kwargs)
        if kwargs.get("device") is not None:
            where = torch.device(kwargs["device"]).type
            if where == NAME:
                kwargs["device"] = "cpu"
            return _put(func(*args, **kwargs), None if where == "meta" else where)
        where = self._of(name, args, kwargs)
        if name == "numpy" and where == NAME:
            raise MixedDevicesError("numpy() of a tensor on the device")
        return _put(func(*args, **kwargs), where)

    def _of(self, name: str, args: Any, kwargs: Any) -> str | None:
        """The side of the result of a call."""
        given = list(_tensors([args, kwargs]))
        there = any(side(tensor) == NAME for tensor in given)
        here = any(side(tensor) == "cpu" and tensor.dim() for tensor in given)
        if name in INDEXING:
            if side(args[0]) == "cpu" and any(side(tensor) == NAME and tensor.dim() for tensor in _tensors(args[1])):
                raise MixedDevicesError(f"{name}: a tensor on the CPU and an index on the device")
            return side(args[0])
        if name == "copy_":
            return side(args[0])
        if there and here:
            shapes = [(tuple(tensor.shape), side(tensor)) for tensor in given]
            raise MixedDevicesError(f"{name} of tensors on both sides: {shapes}")
        return NAME if there else "cpu" if here or not given else None

    def _moved(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu` and `as_tensor`: where to, and as which dtype."""
        of, *rest = args
        where, dtype = "cpu" if name == "cpu" else None, kwargs.get("dtype")
        for value in (*rest, kwargs.get("device")):
            if isinstance(value, torch.device | str):
                where = torch.device(value).type
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                where, dtype = side(value), value.dtype
        known = isinstance(of, torch.Tensor)
        result = of if known else torch.tensor(of)
        if dtype is not None:
            result = result.to(dtype)
        if where in (None, "meta"):
            return _put(result, side(of) if known else "cpu")
        return _put(result.clone() if result is of and side(of) != where else result, where)

    def _got(self, name: str, func: Any, args: Any) -> Any:
        there = side(args[0]) == NAME
        if name == "grad":
            return _put(func(*args), side(args[0]))
        if name == "device":
            return torch.device(NAME, 0) if there else func(*args)
        return there is (name == "is_cuda")


@contextmanager
def pretended() -> Iterator[str]:
    """The name of a device that can be used inside."""
    with _Watch():
        yield NAME
