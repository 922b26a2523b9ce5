"""A device that is not there: every tensor lies on the CPU, but remembers on which side the code put it.

Development machines have no accelerator, and on a CPU nothing shows that a tensor was left behind. Inside `pretended()`
torch's functions are watched: what is made on the device or moved to it says so (`device`, `is_cpu`), what is computed
from it is there too, and a call that mixes both sides raises, as it would on the device. Tensors whose side nobody
knows (saved for a backward pass, read from a file) may go with both. Layers that are computed again in a backward pass
(gradient checkpointing) cannot be watched.

`waits()` counts the places at which a program waits for the device: where it reads a value, asks for a shape that
depends on values, or copies from host memory that is not pinned. `torch.cuda.set_sync_debug_mode` knows the same ones.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from roundoff.numerics import transfer
from roundoff.numerics.backend import triton_problem

NAME = "cuda"
MARK = "pretended_side"
GETTERS = {getattr(torch.Tensor, name).__get__: name for name in ("device", "is_cpu", "is_cuda", "grad")}
SET_DATA = torch.Tensor.data.__set__
INDEXING = ("__getitem__", "__setitem__", "index_put", "index_put_")
READING = (
    *("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__contains__"),
    *(
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
        "one_hot",
        "equal",
        "allclose",
    ),
    *("__repr__", "__format__"),
)
"""Functions that wait for a tensor on the device: they return its values, or a shape that depends on them."""
PINNED = "pretended_pinned"
SOURCES = str(Path(__file__).parents[1])


class MixedDevicesError(AssertionError):
    """Tensors of both sides in one call."""


class WaitError(AssertionError):
    """The program waits for the device where it must not."""


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
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] | None = None
        """Where the program waited, while somebody counts."""
        self.refused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.waits is not None and func not in GETTERS and _waits_in(name, args, kwargs):
            self.waits.append(f"{name} in {_caller()}")
            if self.refused:
                raise WaitError(f"the program waits for the device: {self.waits[-1]}")
        if name == "pin_memory":
            return _pinned(args[0])
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


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that the device can read by itself."""
    if side(tensor) == NAME:
        raise MixedDevicesError("pin_memory of a tensor on the device")
    copy = tensor.clone()
    copy.__dict__[PINNED] = True
    return copy


def _there(value: Any) -> bool:
    """Whether a value is a tensor on the device. In a backward pass, tensors of unknown side count as there."""
    if not isinstance(value, torch.Tensor):
        return False
    return side(value) == NAME or (side(value) is None and torch._C._current_graph_task_id() != -1)


def _waits_in(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call waits for the device."""
    first = args[0] if args else None
    if name in ("to", "as_tensor", "tensor", "copy_"):
        # torch groups gradients by device in C++, which this pretence does not reach: it finds them on the CPU
        clips = sys._getframe(2).f_code.co_filename.endswith("clip_grad.py")
        return not clips and _copy_waits(name, args, kwargs)
    if not _there(first):
        return False
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        return any(map(_there, args[1:])) and kwargs.get("output_size") is None
    if name in INDEXING:
        several = isinstance(args[1], tuple) or name.startswith("index_put")
        return any(map(_index_waits, args[1] if several else (args[1],)))
    return name in READING


def _index_waits(index: Any) -> bool:
    """Whether a tensor on the device waits for this index: a mask, a number that is there, or one from host memory."""
    if isinstance(index, list):
        return True
    if not isinstance(index, torch.Tensor):
        return False
    return side(index) == "cpu" or index.dtype in (torch.bool, torch.uint8) or index.dim() == 0


def _copy_waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy between host memory and the device waits."""
    if name == "copy_":
        of, where = args[1], side(args[0])
        there = _there(args[0])
    else:
        of, *rest = args
        targets = (*rest, kwargs.get("device"))
        named = [v for v in targets if isinstance(v, torch.device | str)]
        where = (
            torch.device(named[0]).type
            if named
            else next((side(v) for v in targets if isinstance(v, torch.Tensor)), None)
        )
        there = where == NAME
    if there and not _there(of):
        pinned = isinstance(of, torch.Tensor) and (PINNED in of.__dict__ or side(of) is None)
        return not (pinned and kwargs.get("non_blocking", name == "copy_"))
    return where == "cpu" and _there(of) and not kwargs.get("non_blocking")


def _caller() -> str:
    """The innermost line of roundoff or its tests that is being executed."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(SOURCES) and path != __file__ and "site-packages" not in path:
            return f"{Path(path).relative_to(SOURCES)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


_ACTIVE: list[_Watch] = []


class _Passed:
    """A mark that the pretended device, which computes at once, has passed."""

    def query(self) -> bool:
        return True


@contextmanager
def pretended() -> Iterator[str]:
    """The name of a device that can be used inside; a real one of that name is hidden."""
    watch = _Watch()
    _ACTIVE.append(watch)
    try:
        with (
            mock.patch.object(transfer, "mark", lambda device: _Passed()),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            watch,
        ):
            yield NAME
    finally:
        _ACTIVE.remove(watch)


@contextmanager
def waits(*, refused: bool = False) -> Iterator[list[str]]:
    """Where the program waits for the pretended device inside the block; with `refused`, the first wait raises.

    Raises:
        WaitError: with `refused`, where the program waits.
    """
    watch = _ACTIVE[-1]
    triton_problem(NAME)  # Triton is tried once in a process, which waits
    before = watch.waits, watch.refused
    watch.waits, watch.refused = [], refused
    try:
        yield watch.waits
    finally:
        watch.waits, watch.refused = before
