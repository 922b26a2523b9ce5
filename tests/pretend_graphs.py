"""CUDA graphs without CUDA: what a step does is recorded below torch's functions, undone, and repeated on demand.

As on a device, a recorded step repeats the same operations on the same memory with the same numbers, whatever the
Python code would do now; recording executes nothing in the end, and an operation that reads a value fails.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select", "unique_consecutive")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if name in READING or masks:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(given):
                    self._keep(tensor.untyped_storage())
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)


class RecordedGraph:
    """A recorded step."""

    def __init__(self, step: Callable[[], None], replays: list[Any]) -> None:
        recorder = _Recorder()
        try:
            with recorder:
                step()
        finally:
            recorder.undo()
        self.calls, self.replays = recorder.calls, replays

    def replay(self) -> None:
        """Repeat the operations on the memory that they used."""
        self.replays.append(self)
        for func, args, kwargs, out in self.calls:
            used = {tensor.untyped_storage().data_ptr() for tensor in _tensors([args, *kwargs.values()])}
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in used:
                    old.copy_(new)


class RecordedGraphs:
    """Records steps, and counts."""

    def __init__(self) -> None:
        self.captures: list[RecordedGraph] = []
        self.replays: list[RecordedGraph] = []

    def capture(self, step: Callable[[], None]) -> RecordedGraph:
        """Record a step."""
        self.captures.append(RecordedGraph(step, self.replays))
        return self.captures[-1]
